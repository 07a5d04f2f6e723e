"""Plan a training step of a whole model: seconds by schedule, and the frames that fit.

What is assumed, so that a few numbers of a model's configuration are enough:

- Every rank encodes its frames.  Text is sharded, too; its self-attention gathers the text's keys
  and values, and leaves out none that a causal mask hides.
- Every layer is checkpointed, so that a step computes its forward twice, and the vision tower runs
  one frame at a time.  The attention to the frames keeps what `memory` says, and runs once.
- Arithmetic takes place at the machine's rate for attention, one multiplication for each weight and
  token.  Norms, biases, positions, projectors, resamplers and the optimizer are left out.
- Weights, gradients and the states of AdamW are sharded over the ranks (FSDP).  Their messages,
  which depend on the weights alone, are counted but not timed.
"""

from dataclasses import dataclass
from typing import Any

from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Machine
from lvxattn.plan.memory import largest, memory
from lvxattn.plan.models import MODELS, Model, planned
from lvxattn.plan.simulate import play

# Of a convolution that makes a token of an image: 14 x 14 pixels of three colours.
PIXELS = 14 * 14 * 3
# AdamW's two, in float32.
STATES = 8


@dataclass(frozen=True)
class Stack:
    """Equal transformer layers.

    Attributes
    ----------
    layers, width, heads, kv_heads, head_dim : int
    mlp : int
        Width of the MLP.
    matrices : int
        Of the MLP: 3 if gated, otherwise 2.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    matrices: int = 2

    @property
    def parameters(self) -> int:
        """Weights of all layers."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + self.matrices * self.width * self.mlp)


@dataclass(frozen=True)
class Whole:
    """Sizes of a whole model, beside those of its cross-attention.

    Attributes
    ----------
    attention : Model
    text : Stack
        Layers of self-attention; those of cross-attention are not among them.
    tower : Stack
    vocabulary : int
    tables : int
        Of embeddings and output: 1 if they are the same.
    patches : int
        Tokens that the tower computes for a frame, all of which attend to each other.
    cross_mlp, cross_matrices : int
        Of the MLP behind a layer of cross-attention, if it has one.
    own_queries : bool
        Whether such a layer has projections of queries and results of its own.
    vision_width : int
        Of the features that keys and values are made of.

    Examples
    --------
    >>> from lvxattn.plan import WHOLE
    >>> f"{WHOLE['llama3v'].parameters / 1e9:.1f} billion"
    '10.6 billion'
    """

    attention: Model
    text: Stack
    tower: Stack
    vocabulary: int
    tables: int
    patches: int
    vision_width: int
    cross_mlp: int = 0
    cross_matrices: int = 2
    own_queries: bool = True

    @property
    def name(self) -> str:
        """The model's name."""
        return self.attention.name

    @property
    def kv_parameters(self) -> int:
        """Weights that make keys and values of the frames."""
        model = self.attention
        return 2 * model.cross_layers * self.vision_width * model.kv_heads * model.head_dim

    @property
    def text_parameters(self) -> int:
        """Weights that each text token is multiplied by."""
        model, width = self.attention, self.text.width
        queries = 2 * width * model.heads * model.head_dim if self.own_queries else 0
        cross = model.cross_layers * (queries + self.cross_matrices * width * self.cross_mlp)
        return self.text.parameters + cross + self.vocabulary * width

    @property
    def tower_parameters(self) -> int:
        """Weights that each patch of a frame is multiplied by."""
        return self.tower.parameters + PIXELS * self.tower.width

    @property
    def parameters(self) -> int:
        """All weights."""
        others = (self.tables - 1) * self.vocabulary * self.text.width
        return self.tower_parameters + self.text_parameters + self.kv_parameters + others


@dataclass(frozen=True)
class Step:
    """Seconds of a training step, on the slowest rank.

    Attributes
    ----------
    tower, text, cross : float
        Of forwards, the second forward of checkpointed layers, and backward.  `cross` has the
        projections to keys and values, too.
    """

    tower: float
    text: float
    cross: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.tower + self.text + self.cross


def step(
    whole: Whole,
    machine: Machine,
    text_tokens: int,
    frames: int,
    P: int,
    *,
    dtype: str,
    schedule: str,
    passes: float | None = None,
) -> Step:
    """Return the time of a training step of one sequence.  Not collective.

    Parameters
    ----------
    whole : Whole
    machine : Machine
    text_tokens, frames : int
    P : int
        Number of ranks.
    dtype, schedule : str
    passes : float, optional
        Seconds of one cross-attention, forward and backward, where they are known already.

    Returns
    -------
    Step

    Examples
    --------
    >>> from lvxattn.plan import MACHINES
    >>> given = MACHINES["a100-16"], 2048, 1200, 16
    >>> ours, ring = (step(WHOLE["llama3v"], *given, dtype="bfloat16", schedule=s)
    ...     for s in ("lv-xattn", "ring"))
    >>> round(ring.total / ours.total, 1)
    2.0
    """
    model, text, tower = whole.attention, whole.text, whole.tower
    s_q, own = -(-text_tokens // P), -(-frames // P)
    # Two forwards, and a backward that takes as long as two: 2 operations a weight and token.
    rate = machine.matmul / (4 * 2)
    scores = 2 * tower.layers * tower.heads * tower.head_dim * whole.patches**2
    of_tower = own * (whole.tower_parameters * whole.patches + scores) / rate
    queries = (1, text.heads, text_tokens, text.head_dim)
    keys = (1, text.kv_heads, text_tokens, text.head_dim)
    itself = planned(queries, keys, P, dtype=dtype, schedule="gather")
    attention = 2 * play(itself, machine).seconds + play(itself, machine, backward=True).seconds
    of_text = s_q * whole.text_parameters / rate + text.layers * attention
    if passes is None:
        q, k = model.shapes(text_tokens, frames)
        layout = planned(q, k, P, dtype=dtype, schedule=schedule, machine=machine)
        passes = sum(play(layout, machine, backward=b).seconds for b in (False, True))
    made = own * model.tokens_per_frame * whole.kv_parameters / rate
    return Step(of_tower, of_text, made + model.cross_layers * passes)


def step_memory(
    whole: Whole, text_tokens: int, frames: int, P: int, *, dtype: str, recompute: bool
) -> int:
    """Return the bytes of a rank in a training step.

    Parameters
    ----------
    whole : Whole
    text_tokens, frames, P, dtype, recompute
        As given to `memory`.
    """
    narrow, (s_q, own) = ITEMSIZE[dtype], (-(-n // P) for n in (text_tokens, frames))
    model, text = whole.attention, whole.text
    states = whole.parameters * (2 * narrow + STATES) // P
    inputs = (text.layers + model.cross_layers) * s_q * text.width * narrow
    pixels = own * whole.patches * PIXELS * narrow
    attention = memory(model, text_tokens, frames, P, dtype=dtype, recompute=recompute).total
    return states + inputs + pixels + attention


def most_frames_of_step(
    whole: Whole, text_tokens: int, P: int, room: float, *, dtype: str, recompute: bool
) -> int:
    """Return the largest number of frames for which `step_memory` fits into a rank.

    Parameters
    ----------
    whole : Whole
    text_tokens, P, room, dtype, recompute
        As given to `most_frames`.

    Examples
    --------
    >>> given = {"dtype": "bfloat16", "recompute": True}
    >>> most_frames_of_step(WHOLE["llama3v"], 2048, 16, room=80e9, **given)
    13361
    """
    given: dict[str, Any] = {"dtype": dtype, "recompute": recompute}
    return largest(lambda n: step_memory(whole, text_tokens, n, P, **given) <= room)


def traffic(whole: Whole, P: int, dtype: str) -> int:
    """Return the bytes that a rank sends for weights and gradients in a step (FSDP).

    Weights are gathered twice, and gradients are added up once.
    """
    return 3 * whole.parameters * ITEMSIZE[dtype] * (P - 1) // P


def _qwen(layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> Stack:
    return Stack(layers, heads * head_dim, heads, kv_heads, head_dim, mlp, 3)


_SIGLIP = Stack(27, 1152, 16, 16, 72, 4304)
_CLIP = Stack(24, 1024, 16, 16, 64, 4096)
_OWL: dict[str, Any] = {"patches": 729, "own_queries": False}

# From the configurations: Llama 3.2 11B Vision (of its 40 layers 32 are self-attention), Qwen2 with
# SigLIP, MPT-7B and -1B with CLIP ViT-L/14.
WHOLE = {
    whole.name: whole
    for whole in (
        Whole(
            MODELS["llama3v"], Stack(32, 4096, 32, 8, 128, 14336, 3),
            Stack(40, 1280, 16, 16, 80, 5120), 128256, 2, patches=6404, vision_width=4096,
            cross_mlp=14336, cross_matrices=3,
        ),
        Whole(MODELS["mplug-owl3-7b"], _qwen(28, 28, 4, 128, 18944), _SIGLIP, 152064, 2,
              vision_width=3584, **_OWL),
        Whole(MODELS["mplug-owl3-2b"], _qwen(28, 12, 2, 128, 8960), _SIGLIP, 151936, 1,
              vision_width=1536, **_OWL),
        Whole(MODELS["mplug-owl3-1b"], _qwen(24, 14, 2, 64, 4864), _SIGLIP, 151936, 1,
              vision_width=896, **_OWL),
        Whole(MODELS["openflamingo-9b"], Stack(32, 4096, 32, 32, 128, 16384), _CLIP, 50432, 1,
              patches=257, vision_width=1024, cross_mlp=16384),
        Whole(MODELS["openflamingo-3b"], Stack(24, 2048, 16, 16, 128, 8192), _CLIP, 50432, 1,
              patches=257, vision_width=1024, cross_mlp=8192),
    )
}  # fmt: skip
