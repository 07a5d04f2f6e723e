"""Models of transformers spread over ranks: the same results as one process has."""

# ruff: noqa: E402 - what follows needs torch

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lvxattn.torch_impl.models import distribute
from tests.torch_ranks import torch_report
from tests.zoo import HERE, MODELS, animal

# A unit in the last place, times the products that a gradient passes through in these models.
LIMITS = {"float64": 1e-12, "float32": 2e-4}
QUICK = "mllama", "idefics", "whisper", "owl3_fused"
# Started together: to import transformers takes longer than to compute.
OTHERS = [name for name in HERE if name not in QUICK]
TOGETHER = QUICK, OTHERS[::2], OTHERS[1::2]


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
    names = next(names for names in TOGETHER if name in names)
    report = torch_report(P, "torch_models.py", ",".join(names), "float64,float32")
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
    ("fault", "name", "result", "least"),
    [
        ("no factor P", "mllama", "gradients", 0.1),
        ("no mask function", "mllama", "logits", 1e-3),
        ("positions from the first", "owl3_gated", "logits", 1e-3),
        ("positions from the first", "owl3_fused", "logits", 1e-3),
    ],
)
def test_planted_fault_is_seen(fault: str, name: str, result: str, least: float) -> None:
    report = torch_report(2, "torch_models.py", name, "float64", fault)
    assert min(rank[result] for every in report.values() for rank in every) > least


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: .* got Linear \(on rank 0 of 1\)$"):
        distribute(torch.nn.Linear(2, 2))


def test_distributed_model_is_refused() -> None:
    model, _, _ = animal("whisper", torch.float32)
    distribute(model)
    with pytest.raises(ValueError, match=r"^model: .*not distributed yet \(on rank 0 of 1\)$"):
        distribute(model)


def test_mask_that_is_not_padding_is_refused() -> None:
    model, batch, _ = animal("qformer", torch.float32)
    local = distribute(model).inputs(**batch)
    with pytest.raises(ValueError, match=r"^encoder_attention_mask: .*\(2, 4, 10\)"):
        model(**local, encoder_attention_mask=torch.ones(2, 4, 10))


def test_unknown_text_is_refused() -> None:
    model, _, _ = animal("whisper", torch.float32)
    with pytest.raises(ValueError, match=r"^text: .* got 'cut' "):
        distribute(model, text="cut")


def test_batch_that_was_not_cut_is_refused() -> None:
    model, batch, _ = animal("whisper", torch.float32)
    distribute(model)
    with pytest.raises(RuntimeError, match=r"^inputs: .*Spread\.inputs \(on rank 0 of 1\)$"):
        model(**batch)


def test_other_number_of_images_is_refused() -> None:
    model, batch, _ = animal("mllama", torch.float32)
    local = distribute(model).inputs(**batch)
    names = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"
    with pytest.raises(ValueError, match=r"^inputs: .* 5 images.* got 4 \(on rank 0 of 1\)$"):
        model(**local | {name: local[name][:, :4] for name in names})


def test_dropout_is_refused() -> None:
    model, batch, _ = animal("bart", torch.float32)
    for module in model.modules():
        if type(module).__name__ == "BartAttention":
            module.dropout = 0.1
    local = distribute(model.train()).inputs(**batch)
    with pytest.raises(ValueError, match=r"^dropout: .*BartAttention.*0\.1"):
        model(**local)


@pytest.mark.parametrize(("name", "keys"), [("mllama", 50), ("owl3_gated", 20), ("owl3_fused", 20)])
def test_keys_and_values_are_not_kept(name: str, keys: int) -> None:
    kept = []
    for recompute in (False, True):
        model, batch, _ = animal(name, torch.float32)
        local = distribute(model, recompute_kv=recompute).inputs(**batch)
        sizes: dict[int, int] = {}

        def pack(x: Any, sizes: dict[int, int] = sizes) -> Any:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**local).loss
        kept.append(sum(sizes.values()))
        del loss
    k_and_v = 2 * 2 * 2 * keys * 2 * 8 * 4  # both, layers, B, keys, heads, width, bytes
    assert kept[0] - kept[1] >= k_and_v
