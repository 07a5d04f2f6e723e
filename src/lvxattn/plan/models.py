"""Attention shapes of the models that the paper measures, and layouts of problems yet to be run.

Sources: arXiv:2502.02406, table 1 (cross-attention layers, language-model blocks and visual tokens
per frame); the configurations of Llama 3.2 Vision, mPLUG-Owl3 (Qwen2 language models) and
OpenFlamingo (heads and widths).
"""

from dataclasses import dataclass

from lvxattn.common.handshake import check_grid
from lvxattn.common.layout import Layout, share
from lvxattn.plan.choose import with_grid
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
    check_grid(grid, schedule, P)
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
        grid=grid,
    )
    return with_grid(layout, machine) if schedule == "grid" and grid is None else layout
