"""Problems that break attention kernels, each with a name, a group and a reason.

A `Case` is a recipe; `lvxattn.check.draw` draws its arrays for a dtype and a seed.  In its group
every case is the only one to catch some wrong kernel, which ``python -m lvxattn.check self-test``
proves.
"""

from dataclasses import dataclass, replace

SUITES = ("quick", "full")
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes
    ----------
    name : str
    group : str
        Cases of one group vary one thing.
    reason : str
        What goes wrong there.
    B, H, H_KV, S_Q, S_KV, D, D_V : int
        Sizes of the whole problem.
    data : str
        How q, k and v are drawn: a key of ``case_arrays.DATA``.
    mask : str
        A key of ``case_arrays.MASKS``.
    memory : str
        Memory layout of the arrays: one of ``case_arrays.MEMORY``.
    scale : float, optional
        ``1 / sqrt(D)`` unless given.
    calls : str
        Calls beside those that are judged: none; before them ``"other dtype"``, or a forward and a
        backward on ``"other data"``; ``"in between"``, these between the judged forward and its
        backward; after them ``"repeated"``, the same over and over, of which the results that are
        farthest from the others are judged.
    quick : bool
        Whether the quick suite contains it.
    grows : bool
        Whether the full suite also contains it with longer queries and keys.
    """

    name: str
    group: str
    reason: str
    B: int = 1
    H: int = 2
    H_KV: int = 2
    S_Q: int = 17
    S_KV: int = 40
    D: int = 8
    D_V: int = 8
    data: str = "gaussian"
    mask: str = "none"
    memory: str = "contiguous"
    scale: float | None = None
    calls: str = ""
    quick: bool = True
    grows: bool = True


def suite_of(suite: str) -> list[Case]:
    """Return the cases of a suite.

    Parameters
    ----------
    suite : str
        ``"quick"``, or ``"full"``: those, slower ones, nearly all again with tens of queries and
        hundreds of keys, so that kernels need several tiles, and combinations of sizes, masks,
        memory layouts and scales.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        There is no such suite.

    Examples
    --------
    >>> from lvxattn.check import suite_of
    >>> [case.name for case in suite_of("quick")][:3]
    ['gaussian', 'ragged-lengths', 'one-query']
    """
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    from lvxattn.check.covering import covering, pairs  # here, as choosing them takes a second

    if suite == "quick":
        return [*(case for case in CASES if case.quick), *pairs()]
    return [*_alone(), *pairs(), *covering()]


def case_of(name: str) -> Case:
    """Return the case of a name.

    Parameters
    ----------
    name : str
        ``"NAME"``, ``"NAME.large"``, ``"pairs-NUMBER"`` or ``"combination-NUMBER"``.

    Returns
    -------
    Case

    Raises
    ------
    ValueError
        There is no such case.

    Examples
    --------
    >>> from lvxattn.check import case_of
    >>> case_of("one-query").reason
    'a decode step; many kernels split the keys there'
    """
    combined = name.partition("-")[0] in ("pairs", "combination")
    for case in suite_of("full") if combined else _alone():
        if case.name == name:
            return case
    raise ValueError(f"case: expected one that --list shows, got {name!r}")


def _alone() -> list[Case]:
    """Return the cases that vary one thing."""
    return [*CASES, *(large(case) for case in CASES if case.grows)]


def large(case: Case) -> Case:
    """Return the case with longer queries and keys, of odd lengths, which no tile divides."""
    return replace(
        case, name=f"{case.name}.large", S_Q=4 * case.S_Q + 1, S_KV=8 * case.S_KV - 3, quick=False
    )


CASES: list[Case] = [
    Case("gaussian", "plain", "a plain problem: scale, softmax, gradients", S_Q=32, S_KV=128),
    # Lengths.
    Case("ragged-lengths", "lengths", "97 keys, 31 queries: no tile divides them", S_Q=31,
         S_KV=97, grows=False),
    Case("one-query", "lengths", "a decode step; many kernels split the keys there", B=2, H=8,
         S_Q=1, S_KV=61, H_KV=2, grows=False),
    Case("square", "lengths", "as many queries as keys: nothing is causal unasked", H=1, H_KV=1,
         S_Q=24, S_KV=24, grows=False),
    Case("more-queries-than-keys", "lengths", "136 queries, 20 keys: tiles of queries", H=1, H_KV=1,
         S_Q=136, S_KV=20, grows=False),
    Case("tail-of-one", "lengths", "1,153 keys: one more than whole tiles of 128", H=1, H_KV=1,
         S_Q=4, S_KV=1153, D=4, D_V=4, grows=False),
    Case("one-key", "lengths", "out is that value, dq and dk are 0, lse is its score", S_Q=64,
         S_KV=1, grows=False),
    Case("long-keys", "lengths", "16,000 keys: sums in half precision, capacities, indices",
         H=1, H_KV=1, S_Q=16, S_KV=16000, quick=False, grows=False),
    Case("past-16-bits", "lengths", "33,000 keys: an index of 16 bits", H=1, H_KV=1, S_Q=16,
         S_KV=33000, data="late", quick=False, grows=False),
    # Shards.
    Case("fewer-keys-than-shards", "shards", "some shards are empty: (0, -inf), not lse 0",
         S_Q=32, S_KV=3, grows=False),
    Case("gaps-between-shards", "shards", "each quarter of the keys weighs e^8 times less",
         data="gaps"),
    Case("needle-in-the-last-shard", "shards", "the largest score comes last, far above the rest",
         data="needle"),
    Case("dead-shard", "shards", "a mask hides all that the first shards hold",
         mask="dead shard", B=2, S_Q=9),
    # Scores.
    Case("scores-600", "scores", "scores of 600 and of -600 in every row: exp overflows and "
         "underflows", data="scores"),
    Case("lse-low", "scores", "lse near -800: a maximum that starts at 0, an lse that starts at 0",
         data="low"),
    Case("lse-high", "scores", "lse near 800: exp overflows even in fp64", data="high"),
    Case("negative-scale", "scores", "the scale is -0.3", H=1, H_KV=1, S_KV=33,
         scale=-0.3),
    Case("raw-scores", "scores", "q k^T above 65,504, which the scale brings down to 70",
         H=1, H_KV=1, S_KV=33, scale=2**-10, data="raw"),
    Case("offset-values", "scores", "values near 1,000: dp and delta cancel", data="offset",
         S_Q=64),
    # Masks, by kind.
    Case("random-mask", "mask kinds", "bool, another for every batch entry, head and query",
         mask="random", B=2, S_Q=9),
    Case("finite-minimum", "mask kinds", "additive; what is hidden gets the smallest finite number;"
         " rows that are all -10,000 to that are the mean of the values", mask="finite minimum",
         B=2, S_Q=12, S_KV=37, data="ignored rows"),
    Case("minus-infinity", "mask kinds", "additive with -inf, some rows dead",
         mask="minus infinity", B=2, S_Q=9),
    Case("callable-mask", "mask kinds", "a rule of global indices", mask="callable", B=2, S_Q=9),
    # Masks, by how they broadcast.
    Case("mask-over-heads", "mask shapes", "(B, 1, S_Q, S_KV): one for all heads of a batch entry",
         mask="over heads", B=2, S_Q=9),
    Case("mask-over-batches", "mask shapes", "(1, H, S_Q, S_KV): one for all batch entries",
         mask="over batches", B=2, S_Q=9),
    Case("padding-mask", "mask shapes", "(B, 1, 1, S_KV): every batch entry has its own length",
         mask="padding", B=2, S_Q=9),
    Case("mask-over-queries", "mask shapes", "(B, H, 1, S_KV): one for all queries of a head",
         mask="over queries", B=2, S_Q=5, S_KV=33),
    Case("two-dimensional-mask", "mask shapes", "(S_Q, S_KV): one for all", mask="two-dimensional",
         B=2, S_Q=5, S_KV=33),
    Case("expanded-mask", "mask shapes", "(B, H, S_Q, S_KV), stride 0 over the heads",
         mask="expanded", B=2, S_Q=5, S_KV=33),
    Case("decode-mask", "mask shapes", "a decode step with padding", mask="padding", B=3,
         S_Q=1, S_KV=21, grows=False),
    Case("mask-of-grouped-heads", "mask shapes", "every query head has its own mask, pairs of them"
         " share keys; one batch entry", mask="random", H=4, S_Q=5, S_KV=33),
    Case("sparse-mask", "hidden tiles", "bool, two keys for every query: most tiles are hidden",
         mask="sparse", H=1, H_KV=1, S_Q=24, S_KV=128),
    # Rows that see nothing.
    Case("dead-rows", "dead", "some rows see nothing: out 0, lse -inf, no gradient",
         mask="dead rows", B=2, S_Q=9),
    Case("everything-dead", "dead", "no row sees anything", mask="all dead", B=2, S_Q=9),
    # Rows that a number hides.
    Case("hidden-rows", "hidden rows", "gradients through rows that are all -10,000 or less: lse"
         " has lost how many keys there are", mask="finite minimum", H=4, S_Q=12, S_KV=37,
         data="hidden rows"),
    # Heads.
    Case("grouped-heads", "heads", "three query heads read each key-value head", H=6),
    Case("one-kv-head", "heads", "all query heads read one key-value head", H=6, H_KV=1),
    Case("many-heads", "heads", "18 query heads, 9 key-value heads, 5 batch entries", B=5, H=18,
         H_KV=9, S_Q=3, S_KV=6, D=4, D_V=4, grows=False),
    # Head sizes.
    Case("head-size-1", "head sizes", "D = 1, and a scale that is not 1 / sqrt(D)", D=1, D_V=1,
         S_Q=64, scale=0.5),
    Case("odd-head-size", "head sizes", "D = 17", D=17, D_V=17),
    Case("value-size", "head sizes", "D_V is less than D", D_V=5),
    Case("wide-values", "head sizes", "D_V is more than D", D_V=24, H=1, H_KV=1, S_Q=5, S_KV=33),
    Case("wide-heads", "head sizes", "D = 96", D=96, D_V=96, H=1, H_KV=1, S_Q=5, S_KV=12,
         grows=False),
    # Memory.
    Case("non-contiguous", "memory", "the last axis has another stride than 1",
         memory="transposed"),
    Case("sequence-major", "memory", "views of (B, S, H, D), as projections give them",
         memory="sequence-major"),
    Case("stride-0", "memory", "k, v and dout are broadcast over the heads: stride 0",
         memory="broadcast"),
    Case("cache", "memory", "views of longer arrays, as of a cache; the rest is NaN",
         memory="cache"),
    Case("read-only", "memory", "nothing may be written into the arguments", memory="read-only"),
    Case("mixed-memory", "mixed memory", "every array has another layout", memory="mixed"),
    # Tables.
    Case("uniform-table", "tables", "equal scores: out is the mean of the values, lse log S_KV",
         data="uniform", S_KV=64, grows=False),
    Case("one-hot-table", "tables", "one score far above all: out is that value, lse that score",
         data="one-hot", S_KV=64, scale=1.0, grows=False),
    # Calls.
    Case("other-dtype-before", "calls", "the same shapes were called in another dtype just before",
         calls="other dtype", grows=False),
    Case("backward-before", "calls", "forward and backward on other data, then forward and backward"
         " again", calls="other data", grows=False),
    Case("repeated", "repeated calls", "the same up to 1,500 times: races, and state",
         S_Q=5, S_KV=33, D=4, D_V=4, calls="repeated", grows=False),
    Case("backward-between", "calls between", "forward and backward on other data, between"
         " a forward and its backward", H=1, H_KV=1, S_KV=33, calls="in between", grows=False),
]  # fmt: skip
