"""A problem that nobody has yet: the layout that ranks would agree on."""

from lvxattn.common.layout import Layout, share


def planned(
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    P: int,
    *,
    D_V: int | None = None,
    dtype: str = "bfloat16",
    schedule: str = "lv-xattn",
) -> Layout:
    """Return the layout of a problem that is cut evenly.  Not collective.

    Parameters
    ----------
    q : (B, H, S_Q, D)
    k : (B, H_KV, S_KV, D)
        Sizes of the whole.
    P : int
        How many ranks there are to be; their hosts are filled in rank order.
    D_V : int, optional
        D unless given.
    dtype : str
    schedule : str

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        There is no rank, or H is no multiple of H_KV.
    """
    (B, H, S_Q, D), (_, H_KV, S_KV, _) = q, k
    if P < 1:
        raise ValueError(f"P: expected at least 1 rank, got {P}")
    if H % H_KV:
        raise ValueError(f"k: expected H_KV to divide q's H = {H}, got H_KV = {H_KV}")

    def lengths(whole: int) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in (share(whole, r, P) for r in range(P)))

    return Layout(
        rank=0,
        order=tuple(range(P)),
        s_q=lengths(S_Q),
        s_kv=lengths(S_KV),
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
    )
