"""Attention shapes of models with cross-attention, and layouts of problems yet to be run.

`MODELS` are those that the paper measures, of any number of frames and text tokens.  Sources:
arXiv:2502.02406, table 1 (cross-attention layers, language-model blocks and visual tokens per
frame); the configurations of Llama 3.2 Vision, mPLUG-Owl3 (Qwen2 language models) and OpenFlamingo
(heads and widths).  `PROBLEMS` are others that people run, each of one size and with its source.
"""

from dataclasses import dataclass

from lvxattn.common.handshake import grid_of
from lvxattn.common.layout import Layout, share
from lvxattn.plan.choose import on_hosts, with_grid
from lvxattn.plan.machine import Machine

Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class Model:
    """Sizes of a multimodal model's cross-attention.

    Attributes
    ----------
    name : str
    hidden : int
        Width of the language model.
    heads, kv_heads : int
        Query heads, and the key-value heads that they share.
    head_dim : int
    cross_layers, blocks : int
        Cross-attention layers, and transformer blocks of the language model.
    tokens_per_frame : int
        Visual tokens that one video frame becomes.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    cross_layers: int
    blocks: int
    tokens_per_frame: int

    def shapes(self, text_tokens: int, frames: int, batch: int = 1) -> tuple[Sizes, Sizes]:
        """Return the shapes of the whole problem.

        Parameters
        ----------
        text_tokens, frames : int
        batch : int

        Returns
        -------
        q : (B, H, S_Q, D)
        k : (B, H_KV, S_KV, D)
            Also that of v.

        Raises
        ------
        ValueError
            A count is negative, or batch is below 1.

        Examples
        --------
        >>> MODELS["llama3v"].shapes(text_tokens=2048, frames=10)
        ((1, 32, 2048, 128), (1, 8, 64040, 128))
        """
        for name, count, least in (
            ("text_tokens", text_tokens, 0),
            ("frames", frames, 0),
            ("batch", batch, 1),
        ):
            if count < least:
                raise ValueError(f"{name}: expected at least {least}, got {count}")
        S_KV = frames * self.tokens_per_frame
        return (
            (batch, self.heads, text_tokens, self.head_dim),
            (batch, self.kv_heads, S_KV, self.head_dim),
        )


MODELS = {
    model.name: model
    for model in (
        Model("llama3v", 4096, 32, 8, 128, cross_layers=8, blocks=40, tokens_per_frame=6404),
        Model("mplug-owl3-7b", 3584, 28, 4, 128, cross_layers=4, blocks=28, tokens_per_frame=729),
        Model("mplug-owl3-2b", 1536, 12, 2, 128, cross_layers=4, blocks=28, tokens_per_frame=729),
        Model("mplug-owl3-1b", 896, 14, 2, 64, cross_layers=4, blocks=24, tokens_per_frame=729),
        Model("openflamingo-9b", 4096, 8, 8, 64, cross_layers=8, blocks=32, tokens_per_frame=64),
        Model("openflamingo-3b", 2048, 8, 8, 64, cross_layers=24, blocks=24, tokens_per_frame=64),
    )
}


@dataclass(frozen=True)
class Problem:
    """The cross-attention of a model whose lengths are fixed.

    Attributes
    ----------
    name : str
    about : str
        What attends to what.
    S_Q, S_KV, heads, kv_heads, head_dim : int
    layers : int
        Layers of cross-attention.
    source : str
        Where these sizes were published.
    """

    name: str
    about: str
    S_Q: int
    S_KV: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    source: str

    def shapes(self, batch: int = 1) -> tuple[Sizes, Sizes]:
        """Return the shapes of the whole problem, as `Model.shapes` does.

        Examples
        --------
        >>> PROBLEMS["whisper-large"].shapes()
        ((1, 20, 448, 64), (1, 20, 1500, 64))
        """
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        return (
            (batch, self.heads, self.S_Q, self.head_dim),
            (batch, self.kv_heads, self.S_KV, self.head_dim),
        )


# 121 frames of 1280 x 768 pixels, 24 a second: 16 x 40 x 24 tokens; 25 of audio a second.
_LTX = "Lightricks/LTX-2: model_configurator.py, transformer.py, types.py of ltx-core"
# 81 frames: 21 x 45 x 80 tokens of 1280 x 720 pixels, 21 x 30 x 52 of 832 x 480.
_WAN = "Wan-Video/Wan2.1: wan/configs/{}, shared_config.py, text2video.py"

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("ltx-2-v2a", "audio attends to video", 126, 15360, 32, 32, 64, 48, _LTX),
        Problem("ltx-2-a2v", "video attends to audio", 15360, 126, 32, 32, 64, 48, _LTX),
        Problem(
            "wan-14b", "video attends to text, Wan 2.1 and 2.2", 75600, 512, 40, 40, 128, 40,
            _WAN.format("wan_t2v_14B.py") + "; Wan-Video/Wan2.2: wan/configs/wan_t2v_A14B.py",
        ),
        Problem(
            "wan-1.3b", "video attends to text, Wan 2.1", 32760, 512, 12, 12, 128, 30,
            _WAN.format("wan_t2v_1_3B.py"),
        ),
        Problem(
            "whisper-large", "text attends to 30 s of speech", 448, 1500, 20, 20, 64, 32,
            "k2-fsa/sherpa-onnx: scripts/whisper/model-info.md; arXiv:2212.04356, table 1",
        ),
        Problem(  # 224 x 224 pixels of 3 colours and 258 Fourier features, one head as wide
            "perceiver", "latents attend to the pixels of an image", 512, 50176, 1, 1, 261, 8,
            "google-deepmind/deepmind-research: perceiver/train/experiment.py (sizes); "
            "arXiv:2103.03206 (8 layers)",
        ),
        Problem(  # 16 x 16 patches and a class token; in every second of 12 layers
            "q-former", "queries attend to the patches of an image, BLIP-2", 32, 257, 12, 12, 64, 6,
            "huggingface/transformers: models/blip_2/configuration_blip_2.py",
        ),
        Problem(  # 16 x 16 patches, and the latents themselves
            "flamingo-resampler", "latents attend to the patches of an image", 64, 320, 8, 8, 64, 6,
            "mlfoundations/open_flamingo: open_flamingo/src/helpers.py",
        ),
        Problem(  # 70 x 70 patches, and the latents themselves
            "idefics2-resampler", "latents attend to the patches of an image", 64, 4964,
            16, 4, 96, 3, "huggingface/transformers: models/idefics2/configuration_idefics2.py; "
            "arXiv:2405.02246, section 3 (980 x 980 pixels, patches of 14)",
        ),
    )
}  # fmt: skip


def planned(
    q: Sizes,
    k: Sizes,
    P: int,
    *,
    D_V: int | None = None,
    dtype: str = "bfloat16",
    schedule: str = "lv-xattn",
    grid: tuple[int, int] | None = None,
    machine: Machine | None = None,
) -> Layout:
    """Return the layout of a problem that is sharded evenly.  Not collective.

    Parameters
    ----------
    q : (B, H, S_Q, D)
    k : (B, H_KV, S_KV, D)
        Shapes of the whole problem.
    P : int
        Number of ranks; they fill their hosts in rank order.
    D_V : int, optional
        Default: D.
    dtype : str
    schedule : str
    grid : (int, int), optional
        Of ``"grid"``.  Default: the one that sends the fewest bytes or, on a machine, takes the
        least time.
    machine : Machine, optional

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        P is below 1, or H is not a multiple of H_KV, or grid is not one of P ranks.

    Examples
    --------
    >>> planned((1, 8, 10, 64), (1, 8, 1000, 64), P=4).s_q
    (3, 3, 2, 2)
    """
    (B, H, S_Q, D), (_, H_KV, S_KV, _) = q, k
    if P < 1:
        raise ValueError(f"P: expected at least 1 rank, got {P}")
    if H % H_KV:
        raise ValueError(f"k: expected H_KV to divide q's H = {H}, got H_KV = {H_KV}")
    s_q, s_kv = (
        tuple(part.stop - part.start for part in (share(S, rank, P) for rank in range(P)))
        for S in (S_Q, S_KV)
    )
    layout = Layout(
        rank=0,
        order=tuple(range(P)),
        s_q=s_q,
        s_kv=s_kv,
        masks=(None,) * P,
        rules=(False,) * P,
        B=B,
        H=H,
        H_KV=H_KV,
        D=D,
        D_V=D if D_V is None else D_V,
        dtype=dtype,
        scale=D**-0.5,
        schedule=schedule,
        grid=grid_of(grid, schedule, P),
    )
    layout = on_hosts(layout, machine)
    return with_grid(layout, machine) if schedule == "grid" and grid is None else layout
