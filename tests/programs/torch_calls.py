"""Call torch_impl in all supported ways; rank 0 prints, as JSON, each rank's verdicts by check.

A check is a function of the group that returns one verdict or several.  Arguments:
names of checks; default: all.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from lvxattn import torch_impl
from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.wire import QUERIES
from lvxattn.torch_impl import CrossAttention, Layout, Meter, cross_attention, shard, unshard
from lvxattn.torch_impl.group import Group
from tests.cases import WAYS, WHOLE, options_of
from tests.programs import shared
from tests.programs.start import OnArrays, finish, start

CHECKS: dict[str, Callable[[Group], Any]] = {}
ROTATIONS = "lv-xattn", "ring"


def check(function: Callable[[Group], Any]) -> Callable[[Group], Any]:
    CHECKS[function.__name__] = function
    return function


def wholes(
    *, S_Q: int = 13, S_KV: int = 29, dtype: torch.dtype = torch.float64, D: int = 4, heads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return whole q, k and v, the same on every rank; `heads` times 4 and 2 heads."""
    torch.manual_seed(S_Q)
    shapes = (2, 4 * heads, S_Q, D), (2, 2 * heads, S_KV, D), (2, 2 * heads, S_KV, D)
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def parts(*wholes: Tensor, group: Group) -> list[Tensor]:
    """Return this rank's parts as leaves."""
    return [shard(x, group).clone().requires_grad_() for x in wholes]


def gradients(fn: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Return the result of fn, and the gradients of a loss of it."""
    out = fn(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def close(a: Tensor, b: Tensor, ulps: float = 64) -> bool:
    """Whether a is b but for rounding: sums of tens of terms of size 1."""
    assert a.dtype == b.dtype
    return a.shape == b.shape and bool((a - b).abs().max() <= ulps * torch.finfo(a.dtype).eps)


class Scatter(torch.autograd.Function):
    """Whole to part; the gradient of the whole is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.shape = group, whole.shape
        return shard(whole, group).clone()

    @staticmethod
    def backward(ctx: Any, dpart: Tensor) -> Any:
        whole = dpart.new_zeros(ctx.shape)
        shard(whole, ctx.group).copy_(dpart)
        if ctx.group.size > 1:
            dist.all_reduce(whole)
        return whole, None


class Gather(torch.autograd.Function):
    """Part to whole, on every rank, where all ranks then compute the same."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return unshard(part, group)

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> Any:
        return shard(dwhole, ctx.group).clone(), None


@check
def gradcheck_through_the_group(group: Group) -> Any:
    verdicts = []
    rules = dict.fromkeys(SCHEDULES, lambda b, h, i, j: (i + j + b + h) % 3 > 0)
    for schedule, rule in (rules | {"lv-xattn": None}).items():
        heads = max(2, group.size if schedule == "ulysses" else 2)
        given = wholes(S_Q=4, S_KV=5, D=2, heads=group.size)
        whole = [x[:1, :heads].clone().requires_grad_() for x in given]
        layout = Layout.agree(
            *parts(*(x.detach() for x in whole), group=group), group, schedule=schedule, mask=rule
        )

        def attend(*whole: Tensor, layout: Layout = layout, rule: Any = rule) -> Any:
            q, k, v = (Scatter.apply(x, group) for x in whole)
            out, lse = cross_attention(q, k, v, group, layout=layout, mask=rule, return_lse=True)
            return Gather.apply(out, group), Gather.apply(lse, group)

        # Random combinations of all derivatives, not each by itself: an evaluation takes several
        # collectives.
        verdicts.append(torch.autograd.gradcheck(attend, whole, fast_mode=True))
    return verdicts


@check
def equals_sdpa_on_gathered_tensors(group: Group) -> Any:
    verdicts = []
    for schedule in SCHEDULES:
        for dtype in (torch.float64, torch.float32):
            whole = [x.requires_grad_() for x in wholes(dtype=dtype, heads=group.size)]
            truth = scaled_dot_product_attention(*whole, enable_gqa=True)
            weight = torch.linspace(-1, 1, truth.numel()).view(truth.shape).to(dtype)
            want = [truth.detach(), *torch.autograd.grad(truth, whole, weight)]
            mine = parts(*(x.detach() for x in whole), group=group)
            out = cross_attention(*mine, group, schedule=schedule)
            got = [out.detach(), *torch.autograd.grad(out, mine, shard(weight, group))]
            verdicts += [
                close(unshard(a, group), b, ulps=256) for a, b in zip(got, want, strict=True)
            ]
    return verdicts


@check
def a_loss_of_lse_alone(group: Group) -> Any:
    whole = [x.requires_grad_() for x in wholes()]
    q, k = whole[0], whole[1].repeat_interleave(2, dim=1)
    truth = torch.logsumexp(q @ k.transpose(-1, -2) / 2.0, dim=-1)
    want = torch.autograd.grad(truth.sum(), whole[:2])
    mine = parts(*(x.detach() for x in whole), group=group)
    _, lse = cross_attention(*mine, group, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), mine)
    got = unshard(dq, group), unshard(dk, group)
    return [*(close(a, b, 256) for a, b in zip(got, want, strict=True)), dv.abs().max() < 2.0**-90]


@check
def nothing_goes_through_rows_that_see_nothing(group: Group) -> Any:
    """The gradient of logaddexp of two -inf is NaN."""
    mine = parts(*wholes(heads=group.size), group=group)
    verdicts = []
    for schedule in SCHEDULES:
        rule = {"mask": lambda b, h, i, j: (i > 3) & (j < 99), "schedule": schedule}
        out, lse = cross_attention(*mine, group, return_lse=True, **rule)
        joined = torch.logaddexp(lse, torch.full_like(lse, -torch.inf))
        got = torch.autograd.grad(out.sum() + joined.masked_fill(lse == -torch.inf, 0).sum(), mine)
        verdicts += [bool(x.isfinite().all()) for x in got]
    return verdicts


@check
def nothing_but_what_is_saved_outlives_a_forward(group: Group) -> Any:
    """The graph does not keep the buffers of a layout that serves one call."""
    mine = parts(*wholes(heads=group.size), group=group)
    verdicts = []
    for schedule in SCHEDULES:
        out = cross_attention(*mine, group, schedule=schedule)
        node: Any = out.grad_fn
        verdicts.append(not buffers(node.layout))
    return verdicts


@check
def autocast_casts_as_sdpa_does(group: Group) -> Any:
    verdicts = []
    for dtype, schedule in product((torch.float32, torch.float64), SCHEDULES):
        mine = parts(*wholes(dtype=dtype, heads=group.size), group=group)
        attend = partial(cross_attention, group=group, schedule=schedule)
        with torch.autocast("cpu", torch.bfloat16):
            ours = gradients(attend, *mine)
            theirs = scaled_dot_product_attention(*mine, enable_gqa=True)
        cast = torch.float64 if dtype == torch.float64 else torch.bfloat16
        plain = [x.detach().to(cast).requires_grad_() for x in mine]
        want = gradients(attend, *plain)
        verdicts += [ours[0].dtype == theirs.dtype == cast]
        verdicts += [all(g.dtype == dtype for g in ours[1:])]
        verdicts += [torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, want, strict=True)]
    return verdicts


@check
def under_activation_checkpointing(group: Group) -> Any:
    verdicts = []
    for schedule in SCHEDULES:
        mine = parts(*wholes(heads=group.size), group=group)
        attend = partial(cross_attention, group=group, schedule=schedule)
        want = gradients(attend, *mine)
        calls = [
            lambda *x, r=r, fn=attend: checkpoint(fn, *x, use_reentrant=r) for r in (False, True)
        ]
        # The reentrant kind wants to be called by backward().
        out = calls[1](*mine)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        out.backward(weight)
        reentrant = [out.detach(), *(x.grad for x in mine if x.grad is not None)]
        verdicts += [same(gradients(calls[0], *mine), want), same(reentrant, want)]
    return verdicts


@check
def without_gradients_nothing_is_saved_and_training_goes_on(group: Group) -> Any:
    """Buffers made in inference mode must serve the training that follows."""
    mine = parts(*wholes(heads=group.size), group=group)
    verdicts = []
    for schedule in SCHEDULES:
        layout = Layout.agree(*mine, group, schedule=schedule)
        attend = partial(cross_attention, group=group)
        want = gradients(partial(attend, schedule=schedule), *mine)
        for mode in (torch.inference_mode(), torch.no_grad(), nullcontext()):
            with mode:
                out = cross_attention(*mine, group, layout=layout)
            verdicts += [torch.equal(out, want[0])]
            verdicts += [out.requires_grad == isinstance(mode, nullcontext)]
        verdicts.append(same(gradients(partial(attend, layout=layout), *mine), want))
    return verdicts


@check
def a_reused_layout_means_no_small_collectives(group: Group) -> Any:
    mine = parts(*wholes(heads=group.size), group=group)
    rule = {"mask": lambda b, h, i, j: i >= j - 9}
    verdicts = []
    for schedule in SCHEDULES:
        layout = Layout.agree(*mine, group, schedule=schedule, **rule)
        attend = partial(cross_attention, group=group, **rule)
        want = gradients(partial(attend, schedule=schedule), *mine)
        before = dist.all_gather_object
        dist.all_gather_object = None  # whoever calls it fails
        try:
            got = gradients(partial(attend, layout=layout), *mine)
        finally:
            dist.all_gather_object = before
        verdicts.append(same(got, want))
    return verdicts


@check
def messages_and_bytes_are_those_of_the_formula(group: Group) -> Any:
    mine = parts(*wholes(dtype=torch.bfloat16), group=group)
    P, s_q = (
        group.size,
        [shard(wholes()[0], _at(r, group.size)).shape[2] for r in range(group.size)],
    )
    meter = Meter()
    out = cross_attention(*mine, group, meter=meter)
    rows = 2 * 4
    # On: all queries but those of the right neighbour; results: all but my own.  16 bits and 32.
    queries = (sum(s_q) - s_q[(group.rank + 1) % P]) * rows
    results = (sum(s_q) - s_q[group.rank]) * rows
    forward = queries * 4 * 2 + results * (4 + 2) * 4
    verdicts = [meter.messages == 2 * (P - 1), meter.bytes == (forward if P > 1 else 0)]
    torch.autograd.grad(out.sum(), mine)
    backward = queries * (2 * 4 * 2 + 2 * 4) + results * 4 * 4
    backward += 2 * (P - 1) * 8  # which forward a message belongs to
    verdicts += [meter.messages == 4 * (P - 1)]
    return [*verdicts, meter.bytes == (forward + backward if P > 1 else 0)]


def _at(rank: int, size: int) -> Group:
    """Return the attributes of another rank that `shard` uses."""
    at = Group(None)
    at.rank, at.size = rank, size
    return at


@check
def decoding_allocates_nothing_of_a_block_s_or_a_shard_s_size(group: Group) -> Any:
    """Text of length 1 on the last rank, or replicated, against resident keys."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)
    verdicts = []
    for schedule, queries in shared.DECODES:
        mine = 1 if queries == "replicated" or group.rank == group.size - 1 else 0
        q = torch.randn(1, 8, mine, 64)
        layout = Layout.agree(q, k, v, group, schedule=schedule, queries=queries)

        def step(q: Tensor = q, layout: Layout = layout, queries: str = queries) -> Tensor:
            with torch.inference_mode():
                return cross_attention(q, k, v, group, layout=layout, queries=queries)

        first = step().clone()
        before = buffers(layout)
        again = [step() for _ in range(50)]
        with profile(profile_memory=True) as seen:
            again += [step() for _ in range(3)]
        largest = max(e.cpu_memory_usage for e in seen.events())
        verdicts += [all(torch.equal(x, first) for x in again), buffers(layout) == before]
        # Those are used again, where anything travels, of queries and results, in and out.
        verdicts += [0 < len(before) <= 4 if group.size > 1 else not before]
        verdicts += [largest < k[:, :1].nbytes / 8]
    return verdicts


@check
def text_grows_while_keys_stay(group: Group) -> Any:
    return shared.text_grows_while_keys_stay(group, OnArrays())


@check
def results_outlive_later_calls(group: Group) -> Any:
    return shared.results_outlive_later_calls(group, OnArrays())


def buffers(layout: Layout) -> list[int]:
    """Return the addresses of the layout's free buffers."""
    return sorted(x.buffer.data_ptr() for held in layout.pool.at_rest.values() for x in held)


@check
def replicated_queries(group: Group) -> Any:
    """Every rank has all queries, gets all of out, and computes the same loss."""
    verdicts = []
    masks: list[Any] = [None, lambda b, h, i, j: (i + 2 * j) % 5 > b, torch.zeros(1, 1, 1, 29)]
    masks[2][..., :20] = -torch.inf  # what the first ranks hold is hidden
    for mask, scale in ((None, 500.0), *((mask, 0.5) for mask in masks)):
        q, k, v = (x.requires_grad_() for x in wholes())
        alone = Group(None)
        options: dict[str, Any] = {"scale": scale, "return_lse": True}
        out, lse = cross_attention(q, k, v, alone, mask=mask, **options)
        loss = out.square().sum() + lse.sum()
        want = [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]
        all_q = q.detach().requires_grad_()
        mine = [all_q, *parts(k.detach(), v.detach(), group=group)]
        held = shard(mask, group, 3) if isinstance(mask, Tensor) else mask
        options["queries"] = "replicated"
        out, lse = cross_attention(*mine, group, mask=held, **options)
        dq, dk, dv = torch.autograd.grad(out.square().sum() + lse.sum(), mine)
        got = [out.detach(), lse.detach(), dq, unshard(dk, group), unshard(dv, group)]
        # The error of a score, scale times that of q k, is a relative one of a probability; a
        # gradient is multiplied by the scale once more.
        ulps = 512 * max(1.0, scale) ** 2
        verdicts += [close(a, b, ulps) for a, b in zip(got, want, strict=True)]
        everywhere = group.allgather([out.detach(), dq])
        verdicts += [all(same(x, everywhere[0]) for x in everywhere)]
    dead = cross_attention(
        *mine, group, mask=torch.zeros(mine[1].shape[2], dtype=torch.bool), queries="replicated",
        return_lse=True,
    )  # fmt: skip
    grads = torch.autograd.grad(dead[0].sum() + dead[1].nan_to_num(neginf=0.0).sum(), mine)
    return [
        *verdicts,
        not dead[0].any(),
        bool((dead[1] == -torch.inf).all()),
        not any(g.any() for g in grads),
    ]


@check
def a_layer_under_autocast_takes_features_of_either_dtype(group: Group) -> Any:
    """Features as from an encoder under autocast."""
    torch.manual_seed(0)
    module = CrossAttention(16, 4, num_kv_heads=2, kv_dim=8, bias=True)
    x, y = torch.randn(2, 3 + group.rank, 16), torch.randn(2, 9, 8)
    results = []
    for narrow_x, narrow_y in ((False, False), (True, False), (False, True), (True, True)):
        for recompute in (True, False):
            module.recompute_kv = recompute
            with torch.autocast("cpu", torch.bfloat16):
                out = module(x.bfloat16() if narrow_x else x, y.bfloat16() if narrow_y else y)
            grads = torch.autograd.grad(out.float().sum(), list(module.parameters()))
            results.append([out.detach(), *grads])
    # Cast before or by autocast, kept or made again: the same numbers enter the same products.
    return [
        all(
            close(a, b, 2.0**-3 / torch.finfo(b.dtype).eps * b.abs().max().clamp(min=1).item())
            for a, b in zip(result, results[0], strict=True)
        )
        for result in results
    ]


@check
def groups_and_meshes_beside_one_another(group: Group) -> Any:
    """Two rings at once, each a column of a mesh; and ranks in another order."""
    if group.size % 2:
        return True
    mesh = init_device_mesh("cpu", (group.size // 2, 2), mesh_dim_names=("context", "data"))
    ring = mesh["context"]
    torch.manual_seed(group.rank % 2)  # another problem in each column
    whole = [x + group.rank % 2 for x in wholes()]
    verdicts = []
    for g in (ring, ring.get_group(), Group.of(ring)):
        mine = parts(*whole, group=Group.of(ring))
        truth = scaled_dot_product_attention(*whole, enable_gqa=True)
        for schedule in SCHEDULES:  # two ranks a ring: two heads will do
            out = unshard(cross_attention(*mine, g, schedule=schedule), g)
            verdicts.append(close(out, truth, ulps=256))
    return verdicts


@check
def the_profiler_sees_hop_and_block(group: Group) -> Any:
    mine = parts(*wholes(), group=group)
    with profile() as seen:
        cross_attention(*mine, group)
    names = {e.name for e in seen.events()}
    left = (group.rank - 1) % group.size
    mine, its = (QUERIES.name.format(rank) for rank in (group.rank, left))
    wanted = {f"lv-xattn: hop 0, compute with {mine}"}
    if group.size > 1:
        wanted |= {
            f"lv-xattn: hop 1, compute with {its}",
            f"lv-xattn: hop 1, wait for {its}",
            f"lv-xattn: hop 1, post {mine}",
        }
    return sorted(wanted - names) == []


@check
def the_profiler_sees_what_is_gathered_and_traded(group: Group) -> Any:
    mine = parts(*wholes(heads=group.size), group=group)
    wanted = set[str]()
    with profile() as seen:
        for schedule, what in (("gather", "rows to be gathered"), ("ulysses", "heads")):
            cross_attention(*mine, group, schedule=schedule)
            wanted.add(f"{schedule}: all-to-all, all ranks' {what}")
    names = {e.name for e in seen.events()}
    return wanted <= names if group.size > 1 else not wanted & names


@check
def only_rank_0_s_machine_counts(group: Group) -> Any:
    """The other ranks may have none, or another one: all choose the same schedule."""
    return shared.machine_of_rank_0_counts(group, OnArrays())


@check
def blocks_are_posted_before_the_work_that_hides_them(group: Group) -> Any:
    """Sends and receives are posted before a rank computes."""
    mine, P = parts(*wholes(), group=group), group.size
    # By schedule: after its first, a rank waits for a block and sends it on; results follow work.
    on, last = ["wait block", "post block"], ["wait block"]
    hops = [[*(last if hop == P - 1 else on), "compute"] for hop in range(1, P)]
    with_results = [
        [*hop, *(["wait result"] if number else []), "post result"]
        for number, hop in enumerate(hops)
    ]
    start, home = ["post block", "compute"], ["compute", "wait result"]
    wanted = {
        ("lv-xattn", "forward"): [start, *with_results, home],
        ("lv-xattn", "backward"): [start, *with_results, home],
        ("ring", "forward"): [start, ["compute"], *hops],  # its own block, in two parts
        ("ring", "backward"): [start, *with_results, home],
    }
    verdicts = []
    for schedule in ROTATIONS:
        out = None
        for which in ("forward", "backward"):
            with profile() as seen:
                if which == "forward":
                    out = cross_attention(*mine, group, schedule=schedule)
                elif out is not None:
                    torch.autograd.grad(out.sum(), mine)
            events = [e for e in seen.events() if e.name.startswith(f"{schedule}: hop")]
            events.sort(key=lambda e: e.time_range.start)
            results = "gradients" if schedule == "ring" else "results"
            found = []
            for event in events:
                kind = event.name.split(", ")[1].split()[0]
                what = "result" if results in event.name else "block"
                found.append(kind if kind == "compute" else f"{kind} {what}")
            order = [x for hop in wanted[schedule, which] for x in hop] if P > 1 else ["compute"]
            verdicts.append(found == order)
    return verdicts


@check
def arrays_of_any_stride_work_and_are_left_alone(group: Group) -> Any:
    torch.manual_seed(group.rank)
    q = torch.randn(2, 5 + group.rank, 12, 6, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(2, 6, 14, 12, dtype=torch.float64)[:, :, ::2, ::2]
    v = torch.randn(2, 1, 7, 6, dtype=torch.float64).expand(2, 6, 7, 6)
    odd = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    before = [x.clone() for x in plain]
    strides = [a.stride() != b.stride() for a, b in zip(odd, plain, strict=True)]
    leaves, verdicts = [x.requires_grad_() for x in plain], strides
    for schedule in SCHEDULES:
        attend = partial(cross_attention, group=group, schedule=schedule)
        got, want = gradients(attend, *odd), gradients(attend, *leaves)
        verdicts += [close(a, b, 256) for a, b in zip(got, want, strict=True)]
    untouched = all(torch.equal(a.detach(), b) for a, b in zip(odd, before, strict=True))
    return [*verdicts, untouched]


@check
def twice_through_one_graph_but_not_a_second_derivative(group: Group) -> Any:
    mine = parts(*wholes(heads=group.size), group=group)
    verdicts = []
    for schedule in SCHEDULES:
        out = cross_attention(*mine, group, schedule=schedule)
        once, twice = (torch.autograd.grad(out.sum(), mine, retain_graph=True) for _ in range(2))
        (dq,) = torch.autograd.grad(out.square().sum(), mine[:1], create_graph=True)
        try:
            dq.sum().backward()
        except RuntimeError as error:
            refused = "once_differentiable" in str(error)
        else:
            refused = False
        verdicts += [same(list(once), list(twice)), refused]
    return verdicts


@check
def meta_tensors_have_shapes(group: Group) -> Any:
    """Of out and of every gradient; nothing is sent."""
    shapes = wholes(heads=group.size)
    verdicts, meter = [], Meter()
    for schedule in (*SCHEDULES, "auto", "replicated"):
        option = {"queries" if schedule == "replicated" else "schedule": schedule}
        whole = schedule == "replicated"
        for dtype in (torch.float64, torch.bfloat16):
            mine = [x if whole and x is shapes[0] else shard(x, group) for x in shapes]
            mine = [x.detach().to("meta", dtype).requires_grad_() for x in mine]
            masks = (None, torch.ones(mine[1].shape[2], dtype=torch.bool, device="meta"), causal)
            for mask in masks:
                out, lse = cross_attention(
                    *mine, group, mask=mask, return_lse=True, meter=meter, **option
                )
                grads = torch.autograd.grad(out.sum() + lse.sum(), mine)
                verdicts += [out.is_meta, out.shape == mine[0].shape, out.dtype == dtype]
                verdicts += [
                    lse.shape == out.shape[:3],
                    lse.dtype == torch.promote_types(dtype, torch.float32),
                ]
                verdicts += [
                    g.is_meta and g.shape == x.shape and g.dtype == x.dtype
                    for g, x in zip(grads, mine, strict=True)
                ]
    for recompute in (True, False):
        with torch.device("meta"):
            module = CrossAttention(16, 4, recompute_kv=recompute, group=group)
            x, y = torch.empty(1, 3 + group.rank, 16), torch.empty(1, 5, 16)
        out = module(x, y)
        out.sum().backward()
        verdicts += [out.is_meta and out.shape == x.shape]
        verdicts += [p.grad is not None and p.grad.is_meta for p in module.parameters()]
    return [*verdicts, meter.messages == 0]


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Return a causal mask."""
    return i >= j


class Own(Tensor):
    """A subclass of Tensor, as some data loaders return."""


@check
def subclasses_are_computed_with_as_their_base_and_come_out(group: Group) -> Any:
    mine, verdicts = parts(*wholes(heads=group.size), group=group), []
    mask = torch.ones(1, 1, 1, mine[1].shape[2]).log()
    for schedule in (*SCHEDULES, "replicated"):
        option = {"queries" if schedule == "replicated" else "schedule": schedule}
        given = [mine[0], *mine[1:]]
        if schedule == "replicated":
            given[0] = wholes(heads=group.size)[0].requires_grad_()
        attend = partial(cross_attention, group=group, mask=mask, **option)
        want = gradients(attend, *given)
        own = [x.detach().as_subclass(Own).requires_grad_() for x in given]
        got = gradients(partial(attend, mask=mask.as_subclass(Own)), *own)
        frozen = [torch.nn.Parameter(x.detach()) for x in given]
        verdicts += [type(got[0]) is Own, same(got, want), same(gradients(attend, *frozen), want)]
    torch.manual_seed(0)
    x, y = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    for recompute in (True, False):
        module = CrossAttention(16, 4, recompute_kv=recompute, group=group)
        out = module(x.as_subclass(Own), y.as_subclass(Own))
        verdicts += [type(out) is Own, torch.equal(out, module(x, y))]
    return verdicts


@check
def only_wanted_gradients_are_sent(group: Group) -> Any:
    """Queries, or keys and values, are frozen: other gradients are the same, and less is sent."""
    verdicts, whole = [], wholes(heads=group.size)

    def run(way: str, wanted: str, layout: str = "") -> tuple[dict[str, Tensor], int]:
        """Return the gradients of what is not frozen, and the bytes of both passes."""
        given = {
            name: (x if name in WHOLE.get(way, ()) else shard(x, group)).clone()
            for name, x in zip("qkv", whole, strict=True)
        }
        leaves = [given[name].requires_grad_() for name in wanted]
        meter, options = Meter(), dict[str, Any](options_of(way, group.size))
        if layout:
            options["layout"] = Layout.agree(*given.values(), group, gradients=layout, **options)
        _, *grads = gradients(
            lambda *_: cross_attention(*given.values(), group, meter=meter, **options), *leaves
        )
        return dict(zip(wanted, grads, strict=True)), meter.bytes

    for way in WAYS:
        every, sent = run(way, "qkv")
        travel = {"ring": "kv", "ulysses": "qkv", "replicated keys": "kv"}.get(way, "q")
        if way == "grid":
            a, b = options_of(way, group.size)["grid"]
            travel = "q" * (a > 1) + "kv" * (b > 1)
        for wanted in ("q", "kv", "v"):
            of_layout = "q" if wanted == "q" else "kv"
            found, least = run(way, wanted)
            again, with_layout = run(way, wanted, layout=of_layout)
            all_same, as_much = run(way, wanted, layout="qkv")
            for name in wanted:
                verdicts += [close(x[name], every[name]) for x in (found, again, all_same)]
            saves = set(travel) - set(of_layout) and group.size > 1
            verdicts += [with_layout == least, as_much == sent]
            verdicts.append(least < sent if saves else least == sent)
        # What one rank wants, all compute.
        of_rank = "q" if group.rank == 0 else "kv"
        found, as_much = run(way, of_rank)
        verdicts += [close(found[name], every[name]) for name in of_rank]
        verdicts.append(group.size == 1 or as_much == sent)
    return verdicts


@check
def frozen_features_send_no_gradients(group: Group) -> Any:
    """With recomputation and without it, keys and values that nothing trains are not waited for."""
    torch.manual_seed(0)
    verdicts = []
    for recompute in (True, False):
        module = CrossAttention(16, 4, recompute_kv=recompute, group=group)
        x, y = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
        sent, of_x = [], []
        for frozen in (False, True):
            for projection in (module.k_proj, module.v_proj):
                projection.requires_grad_(not frozen)
            meter, leaf = Meter(), x.clone().requires_grad_()
            out = module(leaf, y, schedule="ring", meter=meter)
            of_x.append(torch.autograd.grad(out.square().sum(), leaf)[0])
            sent.append(meter.bytes)
        verdicts += [close(*of_x), sent[1] < sent[0] or group.size == 1]
    return verdicts


@check
def a_layout_without_a_gradient_refuses_to_compute_it(group: Group) -> Any:
    mine = parts(*wholes(), group=group)
    layout = Layout.agree(*mine, group, gradients="kv")
    try:
        cross_attention(*mine, group, layout=layout)
    except ValueError as error:
        return str(error) == (
            "q: expected no tensor that requires a gradient, as the layout was agreed on with "
            f"gradients='kv', got one (on rank {group.rank} of {group.size})"
        )
    return False


@check
def keys_of_both_kinds_under_one_softmax(group: Group) -> Any:
    """A text's own keys, on every rank, and sharded ones: joined by `merge`, with gradients."""
    q, k, v = wholes(S_KV=29)
    own_k, own_v = wholes(S_KV=13)[1:]
    causal = torch_impl.Causal()
    leaves = [x.requires_grad_() for x in (q, own_k, own_v, k, v)]
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    mask = torch.cat([seen, torch.ones(13, 29, dtype=torch.bool)], dim=1)
    want = gradients(
        lambda q, own_k, own_v, k, v: scaled_dot_product_attention(
            q, torch.cat([own_k, k], dim=2), torch.cat([own_v, v], dim=2), attn_mask=mask,
            enable_gqa=True,
        ),
        *leaves,
    )  # fmt: skip
    mine = [shard(q.detach(), group), own_k, own_v, *(shard(x.detach(), group) for x in (k, v))]
    mine = [x.detach().clone().requires_grad_() for x in mine]
    both = (
        cross_attention(*mine[:3], group, mask=causal, keys="replicated", return_lse=True),
        cross_attention(mine[0], *mine[3:], group, return_lse=True),
    )
    out, _ = torch_impl.merge(*both[0], *both[1])
    weight = shard(
        torch.linspace(-1, 1, want[0].numel(), dtype=torch.float64).view(want[0].shape), group
    )
    dq, down_k, down_v, dk, dv = torch.autograd.grad(out, mine, weight)
    got = [unshard(out.detach(), group), unshard(dq, group), down_k, down_v]
    got += [unshard(dk, group), unshard(dv, group)]
    return [close(a, b) for a, b in zip(got, want, strict=True)]


@check
def a_module_equals_its_parts(group: Group) -> Any:
    """With and without recomputation: the output, and all gradients, summed over the ranks."""
    whole_x, whole_y = wholes()[0].flatten(2)[..., :12], wholes()[1].flatten(0, 1)[:2]
    whole_x = torch.randn(2, 11, 12, generator=torch.Generator().manual_seed(0)).double()
    whole_y = torch.randn(2, 23, 10, generator=torch.Generator().manual_seed(1)).double()
    verdicts, results = [], []
    for recompute in (True, False):
        torch.manual_seed(1)
        module = CrossAttention(
            12, 4, num_kv_heads=2, kv_dim=10, bias=True, recompute_kv=recompute,
            group=group.group, dtype=torch.float64,
        )  # fmt: skip
        x, y = (shard(z, group, 1).clone().requires_grad_() for z in (whole_x, whole_y))
        out = module(x, y)
        out.square().sum().backward()
        torch_impl.sum_gradients(module, group)
        found = [unshard(z, group, 1) for z in (out, x.grad, y.grad) if z is not None]
        results.append([*found, *(p.grad for p in module.parameters() if p.grad is not None)])
    x, y = whole_x.clone().requires_grad_(), whole_y.clone().requires_grad_()
    module.zero_grad()
    q, k, v = (
        p(z).unflatten(-1, (-1, 3)).transpose(1, 2)
        for p, z in ((module.q_proj, x), (module.k_proj, y), (module.v_proj, y))
    )
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    out = module.out_proj(out)
    out.square().sum().backward()
    want = [out.detach(), x.grad, y.grad, *(p.grad for p in module.parameters())]
    for result in results:
        verdicts += [len(result) == len(want) == 11]
        verdicts += [close(a, b, ulps=4096) for a, b in zip(result, want, strict=True)]
    return verdicts


@check
def rows_hidden_by_a_finite_number(group: Group) -> Any:
    return shared.hidden_rows_are_right(group, OnArrays())


@check
def errors_at_a_large_lse_are_hardly_those_of_more_ranks(group: Group) -> Any:
    return shared.errors_grow_at_most_twofold(group, Group(None), OnArrays())


@check
def a_group_that_this_rank_is_not_in(group: Group) -> Any:
    """Raises on that rank only; the group's ranks are not affected."""
    first = dist.new_group([0])
    q = torch.ones(1, 1, 3, 4)
    if group.rank == 0:
        return cross_attention(q, q, q, first).shape == q.shape
    try:
        cross_attention(q, q, q, first)
    except ValueError as error:
        return str(error) == "group: this process is not in it (new_group gave it no member)"
    return False


comm, _ = start()
torch.set_num_threads(1)
report = {}
for name in sys.argv[1:] or CHECKS:
    function = CHECKS[name]
    verdict = function(comm)
    verdicts = comm.allgather(
        [bool(x) for x in (verdict if isinstance(verdict, list) else [verdict])]
    )
    report[name] = verdicts
if comm.rank == 0:
    json.dump(report, sys.stdout)
finish(comm)
