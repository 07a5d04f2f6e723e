"""Models of transformers spread over ranks: the same results as one process has."""

# ruff: noqa: E402 - what follows needs torch

import inspect
import re
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.checkpoint import CheckpointError

from lvxattn.torch_impl.models import distribute
from lvxattn.torch_impl.models.interception import attention
from lvxattn.torch_impl.models.text import Text
from tests.torch_ranks import torch_report
from tests.zoo import BEFORE_5, HERE, MODELS, make_model

# A unit in the last place, times the products that a gradient passes through in these models.
LIMITS = {"float64": 1e-12, "float32": 2e-4}
QUICK = "mllama", "idefics", "whisper", "owl3_fused"
SHARDED = [
    name
    for name in (
        "mllama",
        "openflamingo",
        "openflamingo_all",
        "openflamingo_neox",
        "owl3_gated",
        "owl3_fused",
        "idefics",
        "idefics_without_resampler",
    )
    if name in HERE and not (BEFORE_5 and name.startswith("idefics"))
]
# Started together: to import transformers takes longer than to compute.
OTHERS = [name for name in HERE if name not in QUICK]
TOGETHER = QUICK, *(OTHERS[n::4] for n in range(4))
# With six ranks on few cores time allows one.
DTYPES = {True: "float64,float32", False: "float64"}


def cases() -> list[Any]:
    found = []
    for name in MODELS:
        for P in (1, 2, 3, 6):  # 6: more ranks than images
            marks = [] if name in QUICK and P == 3 else [pytest.mark.slow]
            if name not in HERE:
                marks += [pytest.mark.skip(reason=f"no {name} that can be spread is installed")]
            found.append(pytest.param(name, P, marks=marks))
    return found


def check(key: str, every: list[Any]) -> None:
    """Check what all ranks have found of one model."""
    name, dtype = key.split()[:2]
    # T5Gemma alone has no SDPA: its own attention takes the softmax in float32.
    limit = LIMITS["float32" if name == "t5gemma" else dtype]
    for rank in every:
        assert rank["compared"] > 20
        assert not rank["zero"], key  # nothing would be compared
        assert rank["logits"] < limit, key
        # The loss of some models is computed in float32.
        assert rank["loss"] < LIMITS["float32"], key
        assert rank["gradients"] < limit, (key, rank["worst"])
        assert rank["bits"], key
        sent, planned = rank["bytes"]
        assert sent == planned, key


@pytest.mark.parametrize(("name", "P"), cases())
def test_spread_model_equals_one_process(name: str, P: int) -> None:
    names = ",".join(next(names for names in TOGETHER if name in names))
    dtypes = DTYPES[P <= 3]
    report = torch_report(P, "torch_models.py", names, dtypes, "replicated")
    mine = {key: every for key, every in report.items() if key.split()[0] == name}
    assert len(mine) == 2 * len(dtypes.split(","))
    for key, every in mine.items():
        check(key, every)
        for rank in every:
            for way, found in rank["generated"].items():
                assert found["same"], (key, way)
                # One for the prompt and one for a token, however many are generated.
                assert found["agreed"] <= 2, (key, way)
                cached, alone = found["cached"]
                assert P > 3 or cached == alone, (key, way)


def sharded_cases() -> list[Any]:
    quick = [name for name in SHARDED if name in ("mllama", "openflamingo", "owl3_fused")]
    others = [name for name in SHARDED if name not in quick]
    return [
        pytest.param(names, P, marks=[] if names is quick and P == 3 else [pytest.mark.slow])
        for names in (quick, others[::2], others[1::2])
        for P in (1, 2, 3, 6)
        if names
    ]


@pytest.mark.parametrize(("names", "P"), sharded_cases())
def test_sharded_text_equals_one_process(names: list[str], P: int) -> None:
    dtypes = DTYPES[P <= 3]
    report = torch_report(P, "torch_models.py", ",".join(names), dtypes, "sharded")
    assert len(report) == 2 * len(names) * len(dtypes.split(","))
    for key, every in report.items():
        check(key, every)


@pytest.mark.slow
def test_schedules_send_what_is_planned() -> None:
    schedules = "lv-xattn", "ring", "gather", "ulysses"
    texts = ",".join(f"sharded/{schedule}" for schedule in schedules)
    report = torch_report(2, "torch_models.py", "mllama", "float64", texts)
    sent = {}
    for key, every in report.items():
        check(key, every)
        sent[key.split("/")[1].split()[0]] = max(rank["bytes"][0] for rank in every)
    # A tiny model, whose text is not much shorter than its images.
    assert sent["lv-xattn"] == sent["gather"] < sent["ulysses"] < sent["ring"]


def kept_and_recomputed(report: Any, setting: str, text: str) -> list[Any]:
    return [rank for made in (False, True) for rank in report[f"{setting}/{text}/{made}"]]


SETTINGS = [
    "plain", "checkpointed", "accumulated", "two forwards", "frozen", "features", "ddp", "fsdp2",
    "fsdp2 checkpointed", "one image ddp", "one image fsdp2", "embeddings",
]  # fmt: skip
QUICK_SETTINGS = ["checkpointed", "features", "ddp", "fsdp2"]


@pytest.mark.parametrize("P", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", ["replicated", "sharded"])
@pytest.mark.parametrize(
    "setting",
    [s if s in QUICK_SETTINGS else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS],
)
def test_training_equals_one_process(setting: str, text: str, P: int) -> None:
    quick = setting in QUICK_SETTINGS
    settings = [s for s in SETTINGS if (s in QUICK_SETTINGS) == quick]
    report = torch_report(P, "torch_model_training.py", ",".join(settings), "replicated,sharded")
    for rank in kept_and_recomputed(report, setting, text):
        assert rank["compared"] > 40
        assert rank["gradients"] < LIMITS["float64"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["replicated", "sharded"])
def test_mesh_of_two_dimensions_equals_one_process(text: str) -> None:
    report = torch_report(4, "torch_model_training.py", "fsdp2 mesh", "replicated,sharded")
    for rank in kept_and_recomputed(report, "fsdp2 mesh", text):
        assert rank["compared"] == 88
        assert rank["gradients"] < LIMITS["float64"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["replicated", "sharded"])
def test_low_rank_adapters_equal_one_process(text: str) -> None:
    if not find_spec("peft"):
        pytest.skip("peft is not installed")
    report = torch_report(2, "torch_model_training.py", "lora", "replicated,sharded")
    for rank in kept_and_recomputed(report, "lora", text):
        assert rank["compared"] == 36
        assert rank["gradients"] < LIMITS["float64"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["replicated", "sharded"])
def test_autocast_errs_no_more_than_in_one_process(text: str) -> None:
    report = torch_report(2, "torch_model_training.py", "autocast", "replicated,sharded")
    for rank in kept_and_recomputed(report, "autocast", text):
        assert rank["compared"] == 88
        assert rank["alone"] > 1e-3  # it did compute in bfloat16
        assert rank["gradients"] < 2 * rank["alone"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name", "text", "P", "result", "least"),
    [
        ("no factor P", "mllama", "replicated", 2, "gradients", 0.1),
        ("no mask function", "mllama", "replicated", 2, "logits", 1e-3),
        ("local mask", "mllama", "replicated", 2, "logits", 1e-3),
        ("local positions", "mllama", "sharded", 2, "logits", 1e-3),
        ("tile order", "mllama", "replicated", 2, "logits", 1e-3),
        ("positions from the first", "owl3_gated", "replicated", 2, "logits", 1e-3),
        ("positions from the first", "owl3_fused", "replicated", 2, "logits", 1e-3),
    ],
)
def test_planted_fault_is_seen(
    fault: str, name: str, text: str, P: int, result: str, least: float
) -> None:
    report = torch_report(P, "torch_models.py", name, "float64", text, fault)
    assert min(rank[result] for every in report.values() for rank in every) > least


@pytest.mark.slow
def test_closed_gates_are_seen() -> None:
    report = torch_report(2, "torch_models.py", "mllama", "float64", "replicated", "gates at 0")
    for every in report.values():
        assert all(len(rank["zero"]) > 50 for rank in every)


@pytest.mark.slow
def test_tower_needs_an_image() -> None:
    with pytest.raises(AssertionError, match=r"rank 0:[\s\S]*0 elements"):
        torch_report(6, "torch_models.py", "mllama", "float64", "replicated", "no image")


REFUSED = {
    "other_text": "ValueError: input_ids: expected the same batch on all ranks, got .* on rank 1",
    "other_option": "ValueError: logits_to_keep: expected the same .*, got 0 on rank 0 and 1 on .*",
    "no_images": "ValueError: pixel_values: expected the same batch on all ranks, .* on rank 1",
    "unlike_images": r"ValueError: inputs: .* got \[5, 10\] \(on rank 0 of 2\)",
    "not_cut": r"ValueError: inputs: expected 3 images, .* got 5 \(on rank 1 of 2\)",
    "nothing_cut": r"RuntimeError: inputs: .*Spread\.inputs \(on rank \d of 2\)",
    "dropout": r"ValueError: dropout: expected 0 .* got 0\.1.* \(on rank 1 of 2\)",
}


@pytest.mark.parametrize("text", ["replicated", "sharded"])
def test_error_of_one_rank_is_raised_on_all(text: str) -> None:
    report = torch_report(2, "torch_model_refuse.py", "replicated,sharded")
    for name, message in REFUSED.items():
        for said in report[f"{name} {text}"]:
            assert re.fullmatch(message, said), said


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: .* got Linear \(on rank 0 of 1\)$"):
        distribute(torch.nn.Linear(2, 2))


def test_distributed_model_is_refused() -> None:
    model, _, _ = make_model("whisper", torch.float32)
    distribute(model)
    with pytest.raises(ValueError, match=r"^model: .*not distributed yet \(on rank 0 of 1\)$"):
        distribute(model)


@pytest.mark.skipif("qformer" not in HERE, reason="needs transformers 5")
def test_attention_takes_the_arguments_of_transformers() -> None:
    """Models give the mask by position or by its name."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    names = [list(inspect.signature(f).parameters) for f in (attention, sdpa_attention_forward)]
    assert names[0][4] == names[1][4] == "attention_mask"


@pytest.mark.skipif("qformer" not in HERE, reason="needs transformers 5")
def test_mask_that_is_not_padding_is_refused() -> None:
    model, batch, _ = make_model("qformer", torch.float32)
    local = distribute(model).inputs(**batch)
    with pytest.raises(ValueError, match=r"^encoder_attention_mask: .*\(2, 4, 10\) \(on rank 0"):
        model(**local, encoder_attention_mask=torch.ones(2, 4, 10))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mllama", "cut", r"or 'sharded' for \w+, got 'cut'"),
        ("whisper", "sharded", r"for \w+, got 'sharded'"),
        pytest.param(
            "openflamingo_opt",
            "sharded",
            r"for \w+, which has no rotary embeddings",
            marks=pytest.mark.skipif("openflamingo" not in HERE, reason="not installed"),
        ),
    ],
)
def test_unsupported_text_is_refused(name: str, text: str, expected: str) -> None:
    model, _, _ = make_model(name, torch.float32)
    match = rf"^text: expected 'replicated' {expected} \(on rank 0 of 1\)$"
    with pytest.raises(ValueError, match=match):
        distribute(model, text=text)


@pytest.mark.parametrize("name", [name for name in SHARDED if "without" not in name])
def test_cache_of_sharded_text_is_refused(name: str) -> None:
    model, _, prompt = make_model(name, torch.float32)
    local = distribute(model, text="sharded").inputs(**prompt)
    with pytest.raises(ValueError, match=r"^use_cache: expected False with text='sharded'"):
        model.generate(**local, max_new_tokens=2)


def test_text_of_too_few_rows_is_refused() -> None:
    group = SimpleNamespace(group=SimpleNamespace(size=3))
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^text: expected at least 3 rows, .* got 2$"):
        Text([], cast(Any, group)).cut({"input_ids": ids}, ids)


def test_dropout_is_refused() -> None:
    model, batch, _ = make_model("bart", torch.float32)
    for module in model.modules():
        if type(module).__name__ == "BartAttention":
            module.dropout = 0.1
    spread = distribute(model.train())
    with pytest.raises(ValueError, match=r"^dropout: .*0\.1 as dropout of model\.encoder\.\w+"):
        spread.inputs(**batch)


def test_another_forward_before_a_checkpointed_backward_is_refused() -> None:
    model, batch, _ = make_model("mllama", torch.float32)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    spread = distribute(model)
    local = spread.inputs(**batch)
    loss = model(**local).loss
    mask = batch["cross_attention_mask"].flip(2)
    model(**local | {"cross_attention_mask": mask})
    with pytest.raises(CheckpointError, match=r"\[0, 1\][\s\S]*\[0, 2\]"):
        loss.backward()


def test_packed_texts_are_refused() -> None:
    model, batch, _ = make_model("mllama", torch.float32)
    spread = distribute(model, text="sharded")
    packed = {"attention_mask": None, "position_ids": torch.arange(9)[None] % 5}
    with pytest.raises(ValueError, match=r"^position_ids: .* packed texts cannot be sharded"):
        spread.inputs(**batch | packed)


@pytest.mark.parametrize("name", ["mllama", "owl3_fused"])
def test_text_that_was_not_cut_is_refused(name: str) -> None:
    model, batch, _ = make_model(name, torch.float32)
    local = distribute(model, text="sharded").inputs(**batch)
    twice = local["input_ids"].repeat(1, 2)
    with pytest.raises(ValueError, match=r"^inputs: expected 9 of 9 rows of text, .* got 18 "):
        model(**local | {"input_ids": twice})


@pytest.mark.parametrize("columns", [(4, 2), (5, 1), (1, 2)])
def test_mask_of_other_images_is_refused(columns: tuple[int, int]) -> None:
    model, batch, _ = make_model("mllama", torch.float32)
    local = distribute(model).inputs(**batch)
    images, tiles = columns  # the last two divide the keys
    mask = batch["cross_attention_mask"][:, :, :images, :tiles]
    expected = rf"^mask: expected columns for 5 images, .* got {images * tiles}, 2 for each"
    with pytest.raises(ValueError, match=expected):
        model(**local | {"cross_attention_mask": mask})


def test_text_alone_needs_no_images() -> None:
    model, batch, _ = make_model("mllama", torch.float64)
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    wanted = model(**text).loss
    assert torch.equal(model(**distribute(model).inputs(**text)).loss, wanted)


@pytest.mark.parametrize("as_tuple", [True, False])
def test_outputs_of_the_encoder_are_cut_once(as_tuple: bool) -> None:
    model, batch, _ = make_model("bart", torch.float64)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    alone = model(**batch).logits
    spread = distribute(model)
    made = model.get_encoder()(**given)
    rest = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    outputs = tuple(made.values()) if as_tuple else made
    local = spread.inputs(encoder_outputs=outputs, **rest)
    assert local["encoder_outputs"][0] is made[0]
    assert torch.allclose(model(**local).logits, alone, rtol=1e-12, atol=1e-12)


def test_keys_with_positions_of_their_own_are_refused() -> None:
    from transformers import DetrConfig, DetrModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, **sizes)
    with torch.device("meta"):
        model = DetrModel(config)
    with pytest.raises(ValueError, match=r"^model: .* got DetrModel"):
        distribute(model)


@pytest.mark.parametrize(("name", "keys"), [("mllama", 50), ("owl3_gated", 20), ("owl3_fused", 20)])
def test_keys_and_values_are_not_kept(name: str, keys: int) -> None:
    kept = []
    for recompute in (False, True):
        model, batch, _ = make_model(name, torch.float32)
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
