"""Models of transformers spread over ranks: the same results as one process has."""

# ruff: noqa: E402 - what follows needs torch

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.torch_ranks import torch_report
from tests.zoo import HERE, MODELS

# A unit in the last place, times the products that a gradient passes through in these models.
LIMITS = {"float64": 1e-12, "float32": 2e-4}
QUICK = "mllama", "idefics", "whisper"
# Started together: to import transformers takes longer than to compute.
TOGETHER = {True: QUICK, False: tuple(name for name in HERE if name not in QUICK)}


def cases() -> list[Any]:
    found = []
    for name in MODELS:
        for P in (1, 2, 3, 6):  # 6: more ranks than images
            marks = [] if name in QUICK and P == 3 else [pytest.mark.slow]
            if name not in HERE:
                marks += [pytest.mark.skip(reason=f"the package of {name} is not installed")]
            found.append(pytest.param(name, P, marks=marks))
    return found


@pytest.mark.parametrize(("name", "P"), cases())
def test_spread_model_equals_one_process(name: str, P: int) -> None:
    names = ",".join(TOGETHER[name in QUICK])
    report = torch_report(P, "torch_models.py", names, "float64,float32")
    mine = {key: every for key, every in report.items() if key.split()[0] == name}
    assert len(mine) == 4
    for key, every in mine.items():
        # T5Gemma alone has no SDPA: its own attention takes the softmax in float32.
        limit = LIMITS["float32" if name == "t5gemma" else key.split()[1]]
        for rank in every:
            assert rank["compared"] > 20
            assert rank["logits"] < limit, key
            assert rank["gradients"] < limit, (key, rank["worst"])
            assert all(rank["generated"].values()), (key, rank["generated"])
            assert rank["bits"], key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "result", "least"),
    [("no factor P", "gradients", 0.1), ("no mask function", "logits", 1e-3)],
)
def test_planted_fault_is_seen(fault: str, result: str, least: float) -> None:
    report = torch_report(2, "torch_models.py", "mllama", "float64", fault)
    assert min(rank[result] for every in report.values() for rank in every) > least
