"""Model presets against the figures of the paper and of the models' configurations."""

from dataclasses import astuple

import pytest

from lvxattn.plan import MODELS, PROBLEMS
from tests.errors import says
from tests.launch import ROOT

# name: hidden, heads, key-value heads, head size, cross-attention layers, blocks, tokens a frame
FIGURES = {
    "llama3v": (4096, 32, 8, 128, 8, 40, 6404),
    "mplug-owl3-7b": (3584, 28, 4, 128, 4, 28, 729),
    "mplug-owl3-2b": (1536, 12, 2, 128, 4, 28, 729),
    "mplug-owl3-1b": (896, 14, 2, 64, 4, 24, 729),
    "openflamingo-9b": (4096, 8, 8, 64, 8, 32, 64),
    "openflamingo-3b": (2048, 8, 8, 64, 24, 24, 64),
}
# name: queries, keys, heads, key-value heads, head size, layers, from the configurations' figures
LTX, WAN = (32, 32, 2048 // 32, 48), (40, 40, 5120 // 40, 40)
LTX_VIDEO = (1 + 120 // 8) * (768 // 32) * (1280 // 32)
LTX_AUDIO = round(121 / 24 * 16000 / 160 / 4)
FIXED = {
    "ltx-2-v2a": (LTX_AUDIO, LTX_VIDEO, *LTX),
    "ltx-2-a2v": (LTX_VIDEO, LTX_AUDIO, *LTX),
    "wan-14b": ((1 + 80 // 4) * (720 // 16) * (1280 // 16), 512, *WAN),
    "wan-1.3b": ((1 + 80 // 4) * (480 // 16) * (832 // 16), 512, 12, 12, 1536 // 12, 30),
    "whisper-large": (448, 30 * 100 // 2, 20, 20, 1280 // 20, 32),
    "perceiver": (512, 224**2, 1, 1, 3 + 2 * (2 * 64 + 1), 8),
    "q-former": (32, (224 // 14) ** 2 + 1, 12, 12, 768 // 12, 12 // 2),
    "flamingo-resampler": (64, (224 // 14) ** 2 + 64, 8, 8, 64, 6),
    "idefics2-resampler": (64, (980 // 14) ** 2 + 64, 16, 4, 96, 3),
}


def test_fixed_problems_match_published_figures() -> None:
    assert {name: astuple(x)[2:-1] for name, x in PROBLEMS.items()} == FIXED
    assert not set(PROBLEMS) & set(MODELS)
    for name, x in PROBLEMS.items():
        assert x.name == name
        assert x.shapes(3) == (
            (3, x.heads, x.S_Q, x.head_dim),
            (3, x.kv_heads, x.S_KV, x.head_dim),
        )
        with pytest.raises(ValueError, match=says("batch", 1, 0)):
            x.shapes(0)


def test_table_of_fixed_problems_is_current() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    rows = page.split("| model | what attends to what |")[1].split("\n\n")[0].splitlines()[2:]
    assert rows == [
        f"| `{x.name}` | {x.about} | {x.S_Q:,} | {x.S_KV:,} | "
        f"{x.heads}{f'/{x.kv_heads}' * (x.heads != x.kv_heads)} of {x.head_dim} | {x.layers} "
        f"| {x.source} |"
        for x in PROBLEMS.values()
    ]


def test_presets_match_published_figures() -> None:
    assert {name: astuple(model)[1:] for name, model in MODELS.items()} == FIGURES
    for name, model in MODELS.items():
        assert model.name == name
        assert model.heads % model.kv_heads == 0
    with pytest.raises(AttributeError):
        MODELS["llama3v"].heads = 1  # type: ignore[misc]


def test_shapes_of_the_whole_problem() -> None:
    assert MODELS["llama3v"].shapes(5514, 2386) == ((1, 32, 5514, 128), (1, 8, 15_279_944, 128))
    assert MODELS["mplug-owl3-1b"].shapes(7, 2, batch=3) == ((3, 14, 7, 64), (3, 2, 1458, 64))
    assert MODELS["openflamingo-3b"].shapes(0, 0) == ((1, 8, 0, 64), (1, 8, 0, 64))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1, 1), "^text_tokens: expected at least 0, got -1$"),
        ((1, -2), says("frames", 0, -2)),
        ((1, 1, 0), says("batch", 1, 0)),
    ],
)
def test_bad_counts_raise(arguments: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MODELS["llama3v"].shapes(*arguments)
