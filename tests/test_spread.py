"""Models of transformers spread over ranks: the same results as one process has."""

# ruff: noqa: E402 - what follows needs torch

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.torch_ranks import torch_report
from tests.zoo import MODELS, HERE

# A unit in the last place, times the products that a gradient passes through in these models.
LIMITS = {"float64": 1e-12, "float32": 2e-4}
QUICK = "mllama", "idefics", "whisper"


def cases() -> list[Any]:
    found = []
    for name in MODELS:
        for P in (1, 2, 3):
            marks = [] if name in QUICK and P == 3 else [pytest.mark.slow]
            if name not in HERE:
                marks += [pytest.mark.skip(reason=f"the package of {name} is not installed")]
            found.append(pytest.param(name, P, marks=marks))
    return found


@pytest.mark.parametrize(("name", "P"), cases())
def test_spread_model_equals_one_process(name: str, P: int) -> None:
    for key, every in torch_report(P, "torch_models.py", name, "float64,float32").items():
        limit = LIMITS[key.split()[1]]
        for report in every:
            assert report["compared"] > 20
            assert report["logits"] < limit, key
            assert report["gradients"] < limit, (key, report["worst"])
            assert all(report["generated"].values()), (key, report["generated"])
            assert report["bits"], key
