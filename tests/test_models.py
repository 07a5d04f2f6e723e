"""Model presets against the figures of the paper and of the models' configurations."""

from dataclasses import astuple

import pytest

from lvxattn.plan import MODELS
from tests.errors import says

# name: hidden, heads, key-value heads, head size, cross-attention layers, blocks, tokens a frame
FIGURES = {
    "llama3v": (4096, 32, 8, 128, 8, 40, 6404),
    "mplug-owl3-7b": (3584, 28, 4, 128, 4, 28, 729),
    "mplug-owl3-2b": (1536, 12, 2, 128, 4, 28, 729),
    "mplug-owl3-1b": (896, 14, 2, 64, 4, 24, 729),
    "openflamingo-9b": (4096, 8, 8, 64, 8, 32, 64),
    "openflamingo-3b": (2048, 8, 8, 64, 24, 24, 64),
}


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
