"""mPLUG-Owl3 in one process: its results, against attention written out token by token."""

# ruff: noqa: E402 - what follows needs torch and transformers

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lvxattn.torch_impl.models import distribute
from lvxattn.torch_impl.models.hyper_attention import CACHE, self_attention_mask
from tests.zoo import IMAGES, VOCABULARY, B, S, make_model

IMAGE = VOCABULARY - 1
KINDS = "owl3_gated", "owl3_fused"


def owl(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a model whose rotary embedding is computed in float64, its batch and its prompt."""
    model, batch, prompt = make_model(name, torch.float64)
    assert prompt is not None
    rotary = model.language_model.model.rotary_emb

    def forward(_: Any, position_ids: Any) -> Any:
        angles = position_ids[..., None] * frequencies(2 * rotary.inv_freq.numel()).repeat(2)
        return angles.cos(), angles.sin()

    rotary.forward = forward
    return model, batch, prompt


def frequencies(D: int) -> Any:
    """Return the rotary frequencies of a head's D / 2 pairs."""
    return 1e4 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)


def rotated(x: Any, position: int) -> Any:
    """Rotate a vector (D,) to a position; its pairs are complex numbers."""
    real, imaginary = x.chunk(2)
    angle = position * frequencies(len(x))
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def attended(q: Any, keys: list[Any], values: list[Any]) -> Any:
    """Return the softmax-weighted mean of the values (D,)."""
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    return scores.softmax(0) @ torch.stack(values)


def naive_hyper_attention(
    layer: Any, x: Any, y: Any, places: list[int], first: int, fused: bool
) -> Any:
    """Attend from a row's text x (S, E) to itself and to y (images, keys, E), token by token.

    The text before `first` is padding.
    """
    attention, D = layer.self_attn, layer.self_attn.head_dim
    x, y = layer.input_layernorm(x), layer.input_layernorm(y)
    q, k, v = (
        w(x).unflatten(-1, (-1, D)) for w in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    both = attention.v_kv_proj(y).unflatten(-1, (-1, 2 * D))  # (images, keys, H_KV, 2 D)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for t in range(first, S):
        images = [n for n, at in enumerate(places) if at < t or (fused and at == t)]
        for h in range(q.shape[1]):
            mine = h // group
            query = rotated(q[t, h], t)
            text = range(first, t + 1)
            keys = [rotated(k[u, mine], u) for u in text]
            values = [v[u, mine] for u in text]
            seen_keys, seen_values = [], []
            for n in images:
                for feature in both[n, :, mine]:
                    seen_keys.append(rotated(feature[:D], places[n] + (0 if fused else 1)))
                    seen_values.append(feature[D:])
            if fused:
                out[t, h] = attended(query, keys + seen_keys, values + seen_values)
                continue
            out[t, h] = own = attended(query, keys, values)
            if images:
                gate = torch.sigmoid(attention.gate_proj[0](own))
                out[t, h] = own * (1 - gate) + attended(query, seen_keys, seen_values) * gate
    return attention.o_proj(out.flatten(1))


def naive_features(model: Any, pixels: Any) -> Any:
    """Return the features of a row's images: the tower's but for its last layer, projected."""
    tower = getattr(model.vision_model, "vision_model", model.vision_model)
    states = tower.embeddings(pixels)
    for layer in tower.encoder.layers[:-1]:
        states = layer(states, None)
    return model.vision2text_model(states)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_hyper_attention_equals_softmax_token_by_token(name: str, padded: bool) -> None:
    model, _, given = owl(name)
    if not padded:
        del given["attention_mask"]
    layer = model.language_model.model.layers[0]
    computed: list[Any] = []
    layer.self_attn.register_forward_hook(lambda _m, _a, result: computed.append(result[0]))
    model(**given)
    x = model.get_input_embeddings()(given["input_ids"])
    for b in range(B):
        places = (given["input_ids"][b] == IMAGE).nonzero().flatten().tolist()
        assert 3 <= len(places) < IMAGES
        assert places[0] > 0
        first = int((given["attention_mask"][b] == 0).sum()) if padded else 0
        y = naive_features(model, given["pixel_values"][b])
        wanted = naive_hyper_attention(layer, x[b], y, places, first, name == "owl3_fused")
        error = (computed[0][b, first:] - wanted[first:]).abs().max() / wanted.abs().max()
        assert error < 1e-13


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_without_images_it_is_a_qwen2(name: str) -> None:
    from transformers import Qwen2ForCausalLM

    model, _, given = owl(name)
    plain = Qwen2ForCausalLM(model.config.text_config).double().eval()
    plain.model.rotary_emb.forward = model.language_model.model.rotary_emb.forward
    _, unexpected = plain.load_state_dict(model.language_model.state_dict(), strict=False)
    assert unexpected
    text = {key: given[key] for key in ("input_ids", "attention_mask")}
    real = text["attention_mask"].bool()
    got, wanted = (m(**text).logits[real] for m in (model, plain))
    assert (got - wanted).abs().max() < 1e-13 * wanted.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_cache_changes_no_token(name: str) -> None:
    model, _, given = owl(name)
    tokens = [
        model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_token_after_a_cache_sees_its_images() -> None:
    model, _, given = owl("owl3_gated")
    whole = model(**given, use_cache=False).logits
    start = {key: given[key][:, :-1] for key in ("input_ids", "attention_mask")}
    before = model(**start, pixel_values=given["pixel_values"], use_cache=True)
    last = model(
        given["input_ids"][:, -1:], given["attention_mask"], use_cache=True,
        past_key_values=getattr(before, CACHE),
    )  # fmt: skip
    assert (last.logits[:, 0] - whole[:, -1]).abs().max() < 1e-13 * whole.abs().max()


@torch.no_grad()
def test_given_positions_are_those_found() -> None:
    model, _, given = owl("owl3_fused")
    positions = torch.tensor([[2, 3, 5, -1, -1], [2, 3, 5, 7, -1]])
    assert torch.equal(model.find_images(given["input_ids"], IMAGES), positions)
    found = model(**given).logits
    assert torch.equal(model(**given, image_positions=positions).logits, found)
    positions[0, 0] = 1
    assert not torch.equal(model(**given, image_positions=positions).logits, found)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_checkpointed_gradients_are_the_same(name: str, spread: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, batch, _ = owl(name)
        model.train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            batch = distribute(model).inputs(**batch) if spread else batch
        outputs = model(**batch)
        assert checkpointed == (outputs.get(CACHE) is None)
        outputs.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for wanted, got in zip(*gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-13 * wanted.abs().max()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_saved_model_is_loaded(name: str, tmp_path: Path) -> None:
    model, batch, _ = make_model(name, torch.float64)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.hyper_layers == [1, 3]
    wanted = model(**batch).logits
    assert (again(**batch).logits - wanted).abs().max() < 1e-13 * wanted.abs().max()


def test_more_image_tokens_than_images_are_refused() -> None:
    model, _, given = owl("owl3_fused")
    with pytest.raises(ValueError, match=r"^pixel_values: expected 4 images, .* got 3$"):
        model(**given | {"pixel_values": given["pixel_values"][:, :3]})


def test_other_number_of_positions_is_refused() -> None:
    model, _, given = owl("owl3_fused")
    with pytest.raises(ValueError, match=r"^pixel_values: expected 4 images, .* got 5$"):
        model(**given, image_positions=torch.tensor([[2, 3, 5, -1], [2, 3, 5, 7]]))


def test_position_beyond_the_text_is_refused() -> None:
    model, _, given = owl("owl3_fused")
    positions = model.find_images(given["input_ids"], IMAGES)
    positions[1, 4] = S
    with pytest.raises(ValueError, match=r"^image_positions: .* below 9, got \(2, 5\) up to 9$"):
        model(**given, image_positions=positions)


def test_images_after_a_cache_are_refused() -> None:
    model, _, given = owl("owl3_fused")
    before = model(**given, use_cache=True)
    with pytest.raises(ValueError, match=r"^pixel_values: expected none with a cache of 9 tokens"):
        model(**given, past_key_values=getattr(before, CACHE))


def test_other_number_of_images_is_refused_where_it_is_spread() -> None:
    model, _, given = owl("owl3_fused")
    local = distribute(model).inputs(**given)
    with pytest.raises(
        ValueError, match=r"^pixel_values: .* 5 images,.* got 4 \(on rank 0 of 1\)$"
    ):
        model(**local | {"pixel_values": local["pixel_values"][:, :4]})


@pytest.mark.parametrize(
    ("text", "hyper_layers", "message"),
    [
        ({"attention_dropout": 0.1}, (1,), "attention_dropout: expected 0, got 0.1"),
        ({}, (0, 2), "hyper_layers: expected layers from 1 to 2, got"),
        ({}, (3,), "hyper_layers: expected layers from 1 to 2, got"),
    ],
)
def test_wrong_configuration_is_refused(
    text: dict[str, Any], hyper_layers: tuple[int, ...], message: str
) -> None:
    from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config

    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        Owl3(Owl3Config(small | text, hyper_layers=hyper_layers))


def test_other_attention_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attn_implementation: .* got a mask of \(2, 9\)$"):
        self_attention_mask(torch.ones(2, 9), 9)
