"""Give the public functions bad input; rank 0 prints, as JSON, what every rank raised.

After each call the same communicator must still solve a right problem.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lvxattn.common.layout import unshard
from lvxattn.plan import MACHINES
from tests.cases import Case
from tests.judge import solve, worst_ratios
from tests.programs.start import OnArrays, finish, start

comm, implementation = start()
# There the backward is autograd's, and tensors can be wrong in ways of their own.
TORCH = isinstance(implementation, OnArrays)
P, last = comm.size, comm.rank == comm.size - 1
B, H, H_KV, D, D_V, S_Q = 2, 4, 2, 6, 3, 5 * comm.size
H100 = MACHINES["h100"]
CALLS: dict[str, Callable[[], Any]] = {}


def good() -> dict[str, Any]:
    """Return right arguments, forward's and backward's."""
    return {
        "q": np.ones((B, H, 5, D)),
        "k": np.ones((B, H_KV, 7, D)),
        "v": np.ones((B, H_KV, 7, D_V)),
        "dout": np.ones((B, H, 5, D_V)),
        "out": np.ones((B, H, 5, D_V)),
        "lse": np.ones((B, H, 5)),
    }


def forward(layout: Any = None, **changes: Any) -> Any:
    a = good() | changes
    options = {n: x for n, x in a.items() if n in ("scale", "mask", "schedule", "queries", "keys")}
    return implementation.cross_attention(a["q"], a["k"], a["v"], comm, layout=layout, **options)


def backward(**changes: Any) -> Any:
    a = good() | changes
    options = {n: x for n, x in a.items() if n in ("scale", "mask", "schedule", "dlse")}
    return implementation.cross_attention_backward(
        a["dout"], a["q"], a["k"], a["v"], a["out"], a["lse"], comm, **options
    )


def agree(**options: Any) -> Any:
    a = good()
    return implementation.Layout.agree(a["q"], a["k"], a["v"], comm, schedule="auto", **options)


def layer(q: Any = None, make_kv: Any = None) -> Any:
    a = good()
    q, make_kv = a["q"] if q is None else q, make_kv or makes(a["k"], a["v"])
    return implementation.cross_attention_layer(q, None, make_kv, comm)


def makes(*made: Any) -> Callable[[Any], Any]:
    """Return a make_kv that returns this, whatever it is given."""
    return lambda y: made


def bad(name: str, function: Callable[..., Any], **changes: Any) -> None:
    """Let every rank make this call."""
    if function is backward and TORCH:
        return
    CALLS[name] = lambda: function(**changes)


def bad_on_last(name: str, function: Callable[..., Any], **changes: Any) -> None:
    """Let the last rank alone make this call with these changes."""
    if function is backward and TORCH:
        return
    CALLS[name] = lambda: function(**(changes if last else {}))


def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i + j + b + h >= 0


def many_heads() -> dict[str, Any]:
    """Return arguments with key-value heads for any number of ranks up to 3."""
    shapes = {"q": (B, 6, 5, D), "k": (B, 6, 7, D), "v": (B, 6, 7, D_V)}
    return {name: np.ones(shape) for name, shape in shapes.items()}


def zeros(*shape: int, dtype: Any = np.float64) -> Any:
    return np.zeros(shape, dtype)


# Within a rank; test_validation has the rest.
bad("q has 3 axes", forward, q=zeros(H, 5, D))
bad("D = 0", forward, q=zeros(B, H, 5, 0), k=zeros(B, H_KV, 7, 0))
bad("k has another B", forward, k=zeros(3, H_KV, 7, D))
bad("H_KV does not divide H", forward, k=zeros(B, 3, 7, D), v=zeros(B, 3, 7, D_V))
bad("k has another dtype", forward, k=zeros(B, H_KV, 7, D, dtype=np.float32))
bad("integer q", forward, q=zeros(B, H, 5, D, dtype=np.int64))
bad("boolean v", forward, v=zeros(B, H_KV, 7, D_V, dtype=bool))
bad("complex q", forward, q=zeros(B, H, 5, D, dtype=np.complex128))
bad("q is a list", forward, q=[[1.0]])
bad("k is None", forward, k=None)
bad("scale is NaN", forward, scale=float("nan"))
bad("scale is a string", forward, scale="0.5")
bad("scale is an array", forward, scale=np.ones(2))
bad("unknown schedule", forward, schedule="star")
bad("unknown queries", forward, queries="mirrored")
bad("mask does not broadcast over B", forward, mask=zeros(3, 1, 1, 7, dtype=bool))
bad("mask's last axis is all keys", forward, mask=zeros(1, 1, 1, 7 * P + 1, dtype=bool))
bad("mask's query axis is neither 1 nor all", forward, mask=zeros(S_Q + 1, 7, dtype=bool))
bad("mask's query axis is 2 beside B and H", forward, mask=zeros(B, H, 2, 7))
bad("integer mask", forward, mask=zeros(1, 1, 1, 7, dtype=np.uint8))
bad("mask is a list", forward, mask=[True] * 7)
bad("dout has out's shape but for D_V", backward, dout=zeros(B, H, 5, D_V + 1))
bad("dlse has another length", backward, dlse=zeros(B, H, 4))
bad("integer dout", backward, dout=zeros(B, H, 5, D_V, dtype=np.int64))
bad("backward with 3 axes in q", backward, q=zeros(H, 5, D))
bad("make_kv is a name", layer, make_kv="k_proj")
bad("make_kv returns nothing", layer, make_kv=lambda y: None)
bad("make_kv returns three", layer, make_kv=makes(1, 2, 3))
bad("make_kv makes keys of another D", layer, make_kv=makes(zeros(B, H_KV, 7, 8), good()["v"]))
bad("make_kv makes a list", layer, make_kv=makes(good()["k"], [1.0]))
bad("a layer's q has 3 axes", layer, q=zeros(H, 5, D))
# On one rank alone, and between ranks.
bad_on_last("the last rank's q has 3 axes", forward, q=zeros(H, 5, D))
bad_on_last("the last rank's v is a list", forward, v=[1.0])
bad_on_last("the last rank's mask is of integers", forward, mask=zeros(7, dtype=np.int64))
bad_on_last("the last rank's query axis", forward, mask=zeros(2, 7, dtype=bool))
bad_on_last("the last rank's dout", backward, dout=zeros(B, H, 5, D_V + 1))
values = zeros(B, H_KV, 6, D_V)
bad_on_last("the last rank's make_kv", layer, make_kv=makes(good()["k"], values))
bad_on_last(
    "several ranks, and the last one's make_kv raises", layer, make_kv=lambda y: {}["k_proj"]
)
bad_on_last(
    "ranks differ in B",
    forward,
    **{n: x[:1] for n, x in good().items() if n in ("q", "k", "v")},
)
bad_on_last("ranks differ in H", forward, q=zeros(B, 2, 5, D))
bad_on_last("ranks differ in H_KV", forward, k=zeros(B, 4, 7, D), v=zeros(B, 4, 7, D_V))
bad_on_last("ranks differ in D", forward, q=zeros(B, H, 5, 8), k=zeros(B, H_KV, 7, 8), scale=0.5)
bad_on_last("ranks differ in D_V", forward, v=zeros(B, H_KV, 7, 9))
bad_on_last(
    "ranks differ in dtype",
    forward,
    **{n: x.astype(np.float32) for n, x in good().items() if n in ("q", "k", "v")},
)
bad_on_last("ranks differ in scale", forward, scale=0.25)
bad_on_last("ranks differ in schedule", forward, schedule="gather")
bad_on_last("ranks differ in the backward's schedule", backward, schedule="auto")
bad_on_last("ranks differ in queries", forward, queries="replicated")
CALLS["ranks differ in replicated queries"] = lambda: forward(
    queries="replicated", **({"q": zeros(B, H, 6, D)} if last else {})
)
bad_on_last("ranks differ in keys", forward, keys="replicated")
CALLS["ranks differ in replicated keys"] = lambda: forward(
    keys="replicated",
    **({"k": zeros(B, H_KV, 6, D), "v": zeros(B, H_KV, 6, D_V)} if last else {}),
)
CALLS["ranks differ in rules with ring"] = lambda: forward(
    schedule="ring", **({"mask": rule} if last else {})
)
CALLS["ranks differ in rules with ulysses"] = lambda: forward(
    schedule="ulysses", **many_heads(), **({"mask": rule} if last else {})
)
one_head = {"k": zeros(B, 1, 7, D), "v": zeros(B, 1, 7, D_V), "schedule": "ulysses"}
bad("several ranks and one head with ulysses", forward, **one_head)
bad("several ranks and one head with ulysses, backward", backward, **one_head)
bad_on_last("the last rank's machine is a name", agree, machine="h100")
bad_on_last("the last rank's machine computes nothing", agree, machine=replace(H100, matmul=0))
bad_on_last("the last rank's machine has no link", agree, machine=replace(H100, inside=None))
# Every rank wrong in its own way: the lowest one is named.
CALLS["every rank has its own error"] = lambda: (
    forward(q=zeros(H, 5, D)) if last else forward(scale=float("nan"))
)
if not TORCH:
    from tests import fake_cupy

    class Other:
        """An array of a library that nobody here computes with."""

        shape, dtype = (B, H, 5, D), "float64"

    def on_device(*names: str) -> dict[str, Any]:
        return {n: fake_cupy.asarray(x) for n, x in good().items() if n in names}

    def wrong_comm(comm: Any) -> Any:
        a = good()
        return implementation.cross_attention(a["q"], a["k"], a["v"], comm)

    bad("a mask in the communicator's place", wrong_comm, comm=zeros(5, 7, dtype=bool))
    bad("q is of another library", forward, q=Other())
    bad("the backward's q is of another library", backward, q=Other())
    bad_on_last("the last rank's q is of another library", forward, q=Other())
    bad_on_last("the last rank's mask is of another library", forward, mask=Other())
    bad_on_last("the last rank's lse is of another library", backward, **on_device("lse"))
    bad_on_last("ranks differ in library", forward, **on_device("q", "k", "v"))
    bad_on_last(
        "ranks differ in the backward's library",
        backward,
        **on_device("q", "k", "v", "out", "dout", "lse"),
    )
    CALLS["ranks differ in the library of their parts"] = lambda: unshard(
        Other() if last else good()["q"], comm
    )
    CALLS["ranks differ in what they join"] = lambda: unshard([1.0] if last else good()["q"], comm)
if TORCH:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    from lvxattn.torch_impl import CrossAttention, Layout, cross_attention
    from lvxattn.torch_impl import unshard as torch_unshard

    def tensors(**changes: Any) -> Any:
        a = {n: torch.from_numpy(x) for n, x in good().items()} | changes
        options = {n: a[n] for n in ("mask", "layout", "queries") if n in a}
        options["return_lse"] = a.get("return_lse", False)
        return cross_attention(a["q"], a["k"], a["v"], a.get("group"), **options)

    def ones(*shape: int, **options: Any) -> Any:
        return torch.ones(*shape, dtype=torch.float64, **options)

    def module(**changes: Any) -> Any:
        given = {"x": ones(B, 5, 8), "features": ones(B, 7, 9)} | changes
        return CrossAttention(8, 2, kv_dim=9, dtype=torch.float64)(**given)

    def garbled(b: Any, h: Any, i: Any, j: Any) -> Any:
        return b"\xff".decode()

    mesh = init_device_mesh("cpu", (P, 1), mesh_dim_names=("context", "data"))
    layout = Layout.agree(*(torch.from_numpy(good()[n]) for n in "qkv"))
    bad("k is on another device", tensors, k=ones(B, H_KV, 7, D, device="meta"))
    bad("the mask is on another device", tensors, mask=ones(7, device="meta"))
    bad("the mask wants a gradient", tensors, mask=ones(7, requires_grad=True))
    bad("v is a DTensor", tensors, v=distribute_tensor(ones(B, H_KV, 7, D_V), mesh["context"]))
    nested = torch.nested.nested_tensor([ones(5, D), ones(4, D)], layout=torch.jagged)
    bad("q is nested", tensors, q=nested)
    bad_on_last("the last rank's rule fails", tensors, mask=garbled)
    sparse = ones(B, H_KV, 7, D_V).to_sparse()
    k = torch.from_numpy(good()["k"])
    bad_on_last("the last rank's make_kv makes sparse values", layer, make_kv=makes(k, sparse))
    bad_on_last("the last rank's x", module, x=ones(B, 5, 9))
    bad_on_last("the last rank's features have another width", module, features=ones(B, 7, 8))
    bad_on_last("the last rank's features have another B", module, features=ones(1, 7, 9))
    bad_on_last("the last rank's features have 2 axes", module, features=ones(7, 9))
    bad_on_last("the last rank's features are NumPy's", module, features=np.ones((B, 7, 9)))
    bad("q is sparse", tensors, q=ones(B, H, 5, D).to_sparse())
    bad("k is an array of NumPy", tensors, k=good()["k"])
    bad("q is an array of NumPy", tensors, q=good()["q"])
    bad_on_last("the last rank's arrays are NumPy's", tensors, **good())
    bad_on_last("the last rank's mask is NumPy's", tensors, mask=np.ones(7, bool))
    CALLS["parts are NumPy's"] = lambda: torch_unshard(good()["q"])
    CALLS["ranks differ in the library of their parts, with tensors"] = lambda: torch_unshard(
        good()["q"] if last else ones(1, 1, 5, 2)
    )
    bad("a mesh of two dimensions", tensors, group=mesh)
    bad("a group of another kind", tensors, group="world")
    bad("a mask in the group's place", tensors, group=torch.ones(5, 7, dtype=torch.bool))
    bad("a rule in the group's place", tensors, group=rule)
    bad("a layout of other queries", tensors, layout=layout, queries="replicated")
    bad("dropout", lambda: CrossAttention(8, 2, dropout=0.1))
    bad("heads that do not divide", lambda: CrossAttention(8, 3))
    bad("kv heads that do not divide", lambda: CrossAttention(8, 4, num_kv_heads=3))
    bad("no width", lambda: CrossAttention(0, 2))
    bad_on_last("the last rank's mask wants a gradient", tensors, mask=ones(7, requires_grad=True))
    bad_on_last("ranks differ in gradients", tensors, q=ones(B, H, 5, D, requires_grad=True))
    bad_on_last("ranks differ in lse", tensors, return_lse=True)


def raised_by(call: Callable[[], Any]) -> list[Any]:
    """Return the type and the text of what a call raises, and whether that came in time."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - start < 20]
    return ["nothing", "", True]


def still_works() -> bool:
    """Solve a right problem on the same communicator."""
    results = solve(RIGHT, comm, implementation)
    return max(worst_ratios(RIGHT, results, TRUTH).values()) <= 1


RIGHT = Case("right", cut="ragged").make()
TRUTH = RIGHT.truth()
report = {}
for name, call in CALLS.items():
    ranks = comm.allgather([*raised_by(call), still_works()])
    if comm.rank == 0:
        report[name] = ranks
if comm.rank == 0:
    json.dump(report, sys.stdout)
finish(comm)
