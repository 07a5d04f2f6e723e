"""Compile calls of torch_impl on ranks; rank 0 prints, as JSON, each rank's verdicts by check.

A check is a function of the group that returns one verdict or several.  Arguments:
names of checks; default: all.
"""

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

from lvxattn.torch_impl import CrossAttention, Layout, cross_attention, shard
from lvxattn.torch_impl.group import Group
from tests.cases import WAYS, options_of
from tests.programs.start import finish, start

CHECKS: dict[str, Callable[[Group], Any]] = {}


def check(function: Callable[[Group], Any]) -> Callable[[Group], Any]:
    CHECKS[function.__name__] = function
    return function


def compiled(function: Any, **options: Any) -> tuple[Any, Any]:
    """Return a function without graph breaks, and what counts its compilations."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def parts(group: Group, S_Q: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return this rank's queries, keys and values as leaves; numbers of heads suit ulysses."""
    torch.manual_seed(S_Q)
    heads = group.size
    shapes = (2, 4 * heads, S_Q, 4), (2, 2 * heads, 29, 4), (2, 2 * heads, 29, 6)
    whole = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return [shard(x, group).clone().requires_grad_() for x in whole]


def results(function: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    """Return out and lse, and the gradients of a loss of both; hidden rows have none."""
    out, lse = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    loss = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def close(got: list[Tensor], want: list[Tensor], ulps: float = 256) -> list[bool]:
    """Whether tensors are equal but for rounding: sums of tens of terms of size 1."""
    verdicts = []
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        apart = torch.where(a == b, 0.0, a - b)  # -inf is -inf
        verdicts.append(
            a.numel() == 0 or bool(apart.abs().max() <= ulps * torch.finfo(a.dtype).eps)
        )
    return verdicts


@check
def schedules_masks_and_replicated_sides(group: Group) -> Any:
    """In one program, which compiles once."""
    q, k, v = parts(group)
    torch.manual_seed(0)
    every, *every_kv = (
        torch.randn(2, n * group.size, s, 4, dtype=torch.float64, requires_grad=True)
        for n, s in ((4, 13), (2, 29), (2, 29))
    )
    s_kv = k.shape[2]
    torch.manual_seed(group.rank)
    boolean = torch.rand(2, 1, 13, s_kv) > 0.3
    boolean[:, :, 3] = False  # on all ranks: a row that sees nothing
    masks = (None, boolean, torch.randn(13, s_kv, dtype=torch.float64))

    def attend(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        all_q, all_k, all_v, *masks = others
        outs, lses = [], []
        for i, way in enumerate((*WAYS, "auto")):
            given = (all_q if way == "replicated" else q), k, v
            if way == "replicated keys":
                given = q, all_k, all_v
            mask = None if way == "replicated keys" else masks[i % 3]
            options = options_of(way, group.size)
            out, lse = cross_attention(*given, group, mask=mask, return_lse=True, **options)
            outs.append(out.flatten())
            lses.append(lse.flatten())
        return torch.cat(outs), torch.cat(lses)

    def call(function: Any) -> list[Tensor]:
        return results(lambda *leaves: function(*leaves, *masks), q, k, v, every, *every_kv)

    run, counter = compiled(attend)
    return [*close(call(run), call(attend), ulps=4096), counter.frame_count == 1]


def lengths_of_steps(group: Group, steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return a batch for each step, of another length for each rank and in each step."""
    torch.manual_seed(group.rank)
    of_step = [
        (2 + (3 * group.rank + 5 * i) % 11, 3 + (group.rank + 7 * i) % 9) for i in range(steps)
    ]
    return [
        (
            torch.randn(2, s_q, 16, dtype=torch.float64, requires_grad=True),
            torch.randn(2, s_kv, 10, dtype=torch.float64, requires_grad=True),
        )
        for s_q, s_kv in of_step
    ]


def step(function: Any, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the result of a model, and the gradients of a loss of it."""
    out = function(x, y)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, y, *model.parameters()])]


@check
def lengths_change_without_compiling_again(group: Group) -> Any:
    torch.manual_seed(0)
    model = CrossAttention(
        16, 4, num_kv_heads=2, kv_dim=10, bias=True, group=group.group, dtype=torch.float64
    )
    run, counter = compiled(model)
    verdicts = []
    for x, y in lengths_of_steps(group):
        verdicts += close(step(run, model, x, y), step(model, model, x, y), ulps=2**14)
    # Once, and once more when a length has turned out to change.
    return [*verdicts, counter.frame_count == 2]


@check
def layouts_are_held_and_change(group: Group) -> Any:
    """Two calls with one layout, another one in each step, and no small collectives."""

    def twice(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Any:
        out, lse = cross_attention(q, k, v, group, layout=layout, return_lse=True)
        again, _ = cross_attention(q + out[..., :4], k, v, group, layout=layout, return_lse=True)
        return again, lse

    run, counter = compiled(twice)
    verdicts = []
    for S_Q in (13, 14, 17):
        mine = parts(group, S_Q)
        layout = Layout.agree(*mine, group)
        want = results(lambda *x, a=layout: twice(*x, a), *mine)
        before = dist.all_gather_object
        dist.all_gather_object = None  # whoever calls it fails
        try:
            got = [results(lambda *x, a=layout: run(*x, a), *mine) for _ in range(2)]
        finally:
            dist.all_gather_object = before
        verdicts += [*close(got[0], want), *close(got[1], want)]
        # The forwards of eager and of compiled programs are counted together.
        verdicts.append(int(layout.forwards.last) % 2**12 == 6)
    return [*verdicts, counter.frame_count <= 2]


@check
def eager_and_compiled_ranks_mix(group: Group) -> Any:
    """Rank 0 compiles, and its compiler's order, kept results and numbers are those of eager."""
    q, k, v = parts(group)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        one, lse = cross_attention(q, k, v, group, return_lse=True)
        other = cross_attention(q.flip(3), k, v, group, schedule="gather")
        cross_attention(q, k.flip(3), v, group)  # nobody reads it: it is computed nevertheless
        return one + other, lse

    run, _ = compiled(attend)
    mixed = run if group.rank == 0 else attend
    return close(results(mixed, q, k, v), results(attend, q, k, v))


@check
def errors_are_those_of_all_ranks(group: Group) -> Any:
    """From inside of a compiled program, as from eager; then the group is as good as before."""
    q, k, v = (x.detach() for x in parts(group))
    wrong = k[..., :3] if group.rank == group.size - 1 else k
    run, _ = compiled(lambda q, k, v: cross_attention(q, k, v, group))
    said = []
    for function in (run, lambda q, k, v: cross_attention(q, k, v, group)):
        try:
            function(q, wrong, v)
        except ValueError as error:
            said.append(str(error))
    last = group.size - 1
    right = said[0].startswith("k: expected D = 4 on axis 3 as in q, got shape (2, ")
    right &= said[0].endswith(f"(on rank {last} of {group.size})")
    return [len(said) == 2, right, said[0] == said[1], *close([run(q, k, v)], [run(q, k, v)])]


@check
def backwards_in_another_order_are_noticed(group: Group) -> Any:
    """Not where nothing is sent."""
    mine = parts(group)
    run, _ = compiled(lambda q, k, v: cross_attention(q, k, v, group))
    losses = [run(*mine).sum() for _ in range(2)]
    if group.rank == 0:
        losses.reverse()
    try:
        for loss in losses:
            torch.autograd.grad(loss, mine)
    except RuntimeError as error:
        return "call the backwards of several forwards in one order on all ranks" in str(error)
    return group.size == 1


@check
def meshes_and_subgroups_are_found_by_name(group: Group) -> Any:
    if group.size % 2:
        return True
    mesh = init_device_mesh("cpu", (group.size // 2, 2), mesh_dim_names=("data", "context"))
    row = mesh["context"]
    verdicts = []
    mine = parts(Group.of(row))
    for given in (row, row.get_group()):

        def attend(q: Tensor, k: Tensor, v: Tensor, given: Any = given) -> Any:
            return cross_attention(q, k, v, given, return_lse=True)

        run, _ = compiled(attend)
        verdicts += close(results(run, *mine), results(attend, *mine))
    return verdicts


comm, _ = start(timeout=200.0)  # ranks wait for others that compile
warnings.simplefilter("ignore")  # Dynamo trips over its own
torch.set_num_threads(1)
report = {}
for name in sys.argv[1:] or CHECKS:
    verdict = CHECKS[name](comm)
    verdicts = verdict if isinstance(verdict, list) else [verdict]
    report[name] = comm.allgather([bool(x) for x in verdicts])
if comm.rank == 0:
    json.dump(report, sys.stdout)
finish(comm)
