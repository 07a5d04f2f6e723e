"""A layer that recomputes keys and values in its backward has the right gradients."""

import re
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn import mpi_impl, reference
from lvxattn.plan import messages
from lvxattn.reference import VirtualComm, run_ranks
from tests.backends import BACKENDS, MPI_DEVICE, MPI_NUMPY, Backend, host
from tests.cases import Case, Problem
from tests.errors import says
from tests.judge import ratio
from tests.naive import Array, Truth, naive_attention
from tests.tolerances import central_difference, limits, projected

B, H, H_KV, S_Q, S_KV, E, E_V, D, D_V = 2, 4, 2, 7, 11, 5, 6, 3, 2
CASE = Case("layer", B=B, H=H, H_KV=H_KV, S_Q=S_Q, S_KV=S_KV, D=D, D_V=D_V, cut="ragged")
NAMES = ("x", "y", "w_q", "w_k", "w_v")


@dataclass(frozen=True)
class Layer:
    """The whole features and the weights, and dout."""

    x: Array
    y: Array
    w_q: Array
    w_k: Array
    w_v: Array
    dout: Array

    @staticmethod
    def make() -> "Layer":
        shapes = ((B, S_Q, E), (B, S_KV, E_V), (E, H, D), (E_V, H_KV, D), (E_V, H_KV, D_V),
                  (B, H, S_Q, D_V))  # fmt: skip
        rng = np.random.default_rng(0)
        # Small, so that scores move slowly: finite differences see more that way.
        return Layer(*(0.3 * rng.standard_normal(shape) for shape in shapes))

    def problem(self) -> Problem:
        """The attention between the projections, with numbers as large as they may be."""
        q, k, v = (np.einsum("bse,ehd->bhsd", a, w) for a, w in self.pairs())
        return Problem(CASE, q, k, v, self.dout, np.zeros((B, H, S_Q)), D**-0.5, None)

    def pairs(self) -> tuple[tuple[Array, Array], ...]:
        return (self.x, self.w_q), (self.y, self.w_k), (self.y, self.w_v)

    def truth(self) -> tuple[Truth, dict[str, Array]]:
        """Return the truth of the attention, and limits of its results.

        Projected queries, keys and values are themselves sums of E and E_V products; a score is off
        by as much as one of D + E + E_V products of magnitudes, and so are values.
        """
        p = self.problem()
        truth = naive_attention(p.q, p.k, p.v, p.scale, None, p.dout, p.dlse)
        q, k, v = (np.einsum("bse,ehd->bhsd", abs(a), abs(w)) for a, w in self.pairs())
        sizes = naive_attention(p.q, p.k, v, p.scale, None, p.dout, p.dlse).sizes
        k_all = np.repeat(k, H // H_KV, axis=1)
        largest = p.scale * np.einsum("bhid,bhjd->bhij", q, k_all).max()
        truth = replace(truth, sizes=sizes, largest_score=float(max(1.0, largest)))
        return truth, limits(replace(CASE, D=D + E + E_V), truth, "float64", "float64")


def gradients(layer: Layer) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the naive gradients of a layer's arguments, and their limits."""
    truth, limit = layer.truth()
    got, off = {}, {}
    for feature, weight, dheads, spread in (
        ("x", "w_q", "dq", S_Q), ("y", "w_k", "dk", S_KV), ("y", "w_v", "dv", S_KV),
    ):  # fmt: skip
        a, w = getattr(layer, feature), getattr(layer, weight)
        for key, rule, factor, n in (
            (feature, "bhsd,ehd->bse", w, w.shape[1] * w.shape[2]),
            (weight, "bhsd,bse->ehd", a, B * spread),
        ):
            product = partial(np.einsum, rule)
            got[key] = got.get(key, 0.0) + product(truth.results[dheads], factor)
            off[key] = off.get(key, 0.0) + projected(
                product, limit[dheads], truth.sizes[dheads], factor, n
            )
    return got, off


def run_layer(layer: Layer, comm: Any, backend: Backend, **options: Any) -> Any:
    """Return out, what was saved, and the gradients of this rank's part, on the host."""
    implementation = backend.implementation
    project, project_backward = projections(implementation)
    rows, keys = (slice(*cuts[comm.rank : comm.rank + 2]) for cuts in CASE.cuts(comm.size))
    rows = slice(None) if options.get("queries") == "replicated" else rows
    x, y, w_q, w_k, w_v, dout = (
        backend.array(np.ascontiguousarray(a))
        for a in (layer.x[:, rows], layer.y[:, keys], layer.w_q, layer.w_k, layer.w_v,
                  layer.dout[:, :, rows])
    )  # fmt: skip

    def make_kv(y: Any) -> Any:
        return project(y, w_k), project(y, w_v)

    given = project(x, w_q), y, make_kv, comm
    out, saved = implementation.cross_attention_layer(*given, **options)
    dq, dk, dv = implementation.cross_attention_layer_backward(
        dout, saved, make_kv, comm, **options
    )
    dx, dw_q = project_backward(dq, x, w_q)
    dy_k, dw_k = project_backward(dk, y, w_k)
    dy_v, dw_v = project_backward(dv, y, w_v)
    return host(out), saved, [host(g) for g in (dx, dy_k + dy_v, dw_q, dw_k, dw_v)]


def projections(implementation: Any) -> Any:
    """Return the implementation's `project` and `project_backward`."""
    module = import_module(f"{implementation.__name__}.recompute")
    return module.project, module.project_backward


def planned(comm: VirtualComm, **options: Any) -> int:
    """Return how many bytes a rank sends, forward and backward."""
    whole = options.get("queries") == "replicated"
    rows, keys = (b - a for a, b in (c[comm.rank : comm.rank + 2] for c in CASE.cuts(comm.size)))
    q = np.zeros((B, H, S_Q if whole else rows, D))
    k, v = np.zeros((B, H_KV, keys, D)), np.zeros((B, H_KV, keys, D_V))
    layout = reference.Layout.agree(q, k, v, comm, **options)
    sent = (messages(layout, comm.rank, backward=backward) for backward in (False, True))
    return sum(message.nbytes for found in sent for message in found)


def planned_on(P: int, **options: Any) -> list[int]:
    """Return how many bytes each of P ranks sends, forward and backward."""
    return run_ranks(P, lambda comm: planned(comm, **options))


@pytest.mark.parametrize(
    ("schedule", "P"),
    [("lv-xattn", 1), ("lv-xattn", 2), ("lv-xattn", 3), ("lv-xattn", 5), ("ring", 3),
     ("ulysses", 2), ("gather", 3), ("auto", 2), ("replicated", 3), ("grid", 4)],
)  # fmt: skip
def test_gradients_equal_those_of_one_process(schedule: str, P: int) -> None:
    layer, whole = Layer.make(), schedule == "replicated"
    options: Any = {"queries": schedule} if whole else {"schedule": schedule}
    if schedule == "grid":
        options["grid"] = 1, P  # not the one that sends least
        assert planned_on(P, **options) != planned_on(P, schedule=schedule)
    want, limit = gradients(layer)
    truth, heads = layer.truth()
    meters = [reference.Meter() for _ in range(P)]
    parts = run_ranks(
        P, lambda comm: run_layer(layer, comm, BACKENDS[0], meter=meters[comm.rank], **options)
    )
    assert [meter.bytes for meter in meters] == planned_on(P, **options)
    outs = [part[0] for part in parts]
    for out in outs if whole else [np.concatenate(outs, axis=2)]:
        assert ratio(out, truth.results["out"], heads["out"]) <= 1
    for i, name in enumerate(NAMES):
        shares = [part[2][i] for part in parts]
        if whole and name in ("x", "w_q"):  # on every rank
            assert all(ratio(got, want[name], limit[name]) <= 1 for got in shares), name
            continue
        got = np.concatenate(shares, axis=1) if name in "xy" else sum(shares)
        assert ratio(got, want[name], limit[name]) <= 1, name


@pytest.mark.parametrize("backend", [MPI_NUMPY, MPI_DEVICE], ids=lambda backend: backend.name)
def test_gradients_over_mpi_equal_those_of_one_process(backend: Backend) -> None:
    layer = Layer.make()
    want, limit = gradients(layer)
    truth, heads = layer.truth()
    out, _, got = run_layer(layer, MPI.COMM_SELF, backend)
    assert ratio(out, truth.results["out"], heads["out"]) <= 1
    for name, gradient in zip(NAMES, got, strict=True):
        assert ratio(gradient, want[name], limit[name]) <= 1, name


@pytest.mark.parametrize("backend", [MPI_NUMPY, MPI_DEVICE], ids=lambda backend: backend.name)
def test_grid_reaches_both_passes_over_mpi(backend: Backend) -> None:
    q, kv = (backend.array(np.ones((1, 2, s, 4))) for s in (3, 5))
    with pytest.raises(ValueError, match=r"grid: .* product is P = 1, got \(2, 1\)"):
        mpi_impl.cross_attention_layer(
            q, kv, lambda y: (y, y), MPI.COMM_SELF, schedule="grid", grid=(2, 1)
        )
    options: Any = {"schedule": "grid", "grid": (1, 1)}
    out, saved = mpi_impl.cross_attention_layer(q, kv, lambda y: (y, y), MPI.COMM_SELF, **options)
    with pytest.raises(ValueError, match=r"grid: .* product is P = 1, got \(1, 3\)"):
        mpi_impl.cross_attention_layer_backward(
            out, saved, lambda y: (y, y), MPI.COMM_SELF, schedule="grid", grid=(1, 3)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_gradients_match_finite_differences(backend: Backend, name: str) -> None:
    layer, step = Layer.make(), 1e-5
    truth, limit = layer.truth()
    _, off = gradients(layer)

    def run(layer: Layer) -> Any:
        if backend.implementation is mpi_impl:
            return run_layer(layer, MPI.COMM_SELF, backend)
        return run_ranks(1, lambda comm: run_layer(layer, comm, backend))[0]

    gradient = run(layer)[2][NAMES.index(name)]
    for seed in range(2):
        way = np.random.default_rng(seed).uniform(-1, 1, gradient.shape)
        whole = getattr(layer, name)
        ends = [replace(layer, **{name: whole + t * way}) for t in (step, -step)]
        losses = [float((layer.dout * run(end)[0]).sum()) for end in ends]
        # How fast scores and values move as x, y or a weight does.
        moved = replace(layer, **{name: way})
        q, k, _ = (np.einsum("bse,ehd->bhsd", a, w) for a, w in layer.pairs())
        dq, dk, dv = (np.einsum("bse,ehd->bhsd", abs(a), abs(w)) for a, w in moved.pairs())
        left, right = (dq, k) if name in ("x", "w_q") else (q, dk)
        scores = np.einsum("bhid,bhjd->bhij", abs(left), np.repeat(abs(right), 2, axis=1))
        rate = 0.0 if name == "w_v" else D**-0.5 * float(scores.max())
        value_rate = float(dv.max()) if name in ("y", "w_v") else 0.0
        allowed = central_difference(layer.problem(), truth, limit, step, rate, value_rate)
        allowed += float(off[name].sum())
        assert abs((losses[0] - losses[1]) / (2 * step) - (gradient * way).sum()) <= allowed


@pytest.mark.parametrize("schedule", ["lv-xattn", "ring", "gather"])
def test_gradients_equal_those_without_recomputation_bitwise(schedule: str) -> None:
    # The same products of the same arrays, once more: not another way to compute them.
    layer = Layer.make()
    project, _ = projections(reference)

    def both(comm: VirtualComm) -> list[bool]:
        rows, keys = (slice(*cuts[comm.rank : comm.rank + 2]) for cuts in CASE.cuts(comm.size))
        y, dout = layer.y[:, keys], layer.dout[:, :, rows]
        calls = []

        def make_kv(y: Array) -> tuple[Array, Array]:
            calls.append(y)
            return project(y, layer.w_k), project(y, layer.w_v)

        q, option = project(layer.x[:, rows], layer.w_q), {"schedule": schedule}
        out, saved = reference.cross_attention_layer(q, y, make_kv, comm, **option)
        got = reference.cross_attention_layer_backward(dout, saved, make_kv, comm, **option)
        called = len(calls)
        k, v = make_kv(y)
        kept, lse = reference.cross_attention(q, k, v, comm, **option)
        want = reference.cross_attention_backward(dout, q, k, v, kept, lse, comm, **option)
        pairs = zip((out, saved.lse, *got), (kept, lse, *want), strict=True)
        return [called == 2, *(np.array_equal(a, b) for a, b in pairs)]

    for verdicts in run_ranks(3, both):
        assert all(verdicts)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_saved_keeps_no_keys_and_no_values(backend: Backend) -> None:
    layer = Layer.make()
    if backend.implementation is mpi_impl:
        saved = run_layer(layer, MPI.COMM_SELF, backend)[1]
    else:
        saved = run_ranks(1, lambda comm: run_layer(layer, comm, backend)[1])[0]
    assert [field.name for field in fields(saved)] == ["q", "y", "out", "lse", "forms"]
    assert vars(saved).keys() == {"q", "y", "out", "lse", "forms"}
    kept = sum(x.nbytes for name, x in vars(saved).items() if name != "forms")
    assert kept == 8 * (B * S_KV * E_V + B * H * S_Q * (D + D_V + 1))


MAKERS: dict[str, tuple[Any, str]] = {
    "no callable": (
        (1, 2),
        r"^make_kv: expected a callable, make_kv\(y\) -> \(k, v\), got tuple \(1, 2\) \(on rank 1",
    ),
    "no pair": (lambda y: y, says("make_kv", "ndarray", 2, rank=1, of=3)),
    "three": (
        lambda y: (y, y, y),
        r"^make_kv: expected it to return keys and values \(k, v\), got tuple of 3 \(on rank 1",
    ),
    "no array": (lambda y: (y[:, None], 3), says("make_kv: v", 3, rank=1, of=3)),
    "axes": (lambda y: (y, y), says("make_kv: k", (2, 5, 3), rank=1, of=3)),
    "lengths": (
        lambda y: (y[:, None], y[:, None, 1:]),
        says("make_kv: v", "s_kv", 5, (2, 1, 4, 3), rank=1, of=3),
    ),
    "dtype": (
        lambda y: (y[:, None].astype("f4"), y[:, None]),
        says("make_kv: k", "float64", "float32", rank=1, of=3),
    ),
}


@pytest.mark.parametrize("how", MAKERS)
def test_bad_make_kv_raises_on_all_ranks(how: str) -> None:
    bad, pattern = MAKERS[how]

    def layer(comm: VirtualComm) -> str:
        make_kv = bad if comm.rank == 1 else lambda y: (y[:, None], y[:, None])
        with pytest.raises((TypeError, ValueError)) as raised:
            reference.cross_attention_layer(
                np.ones((2, 4, 7, 3)), np.ones((2, 5, 3)), make_kv, comm
            )
        return str(raised.value)

    (text,) = set(run_ranks(3, layer))
    assert re.search(pattern, text)


def test_changed_keys_on_recomputation_raise_on_all_ranks() -> None:
    def layer(comm: VirtualComm) -> str:
        q, y = np.ones((1, 1, 2, 3)), np.ones((1, 1, 5, 3))
        out, saved = reference.cross_attention_layer(q, y, lambda y: (y, y), comm)

        def shorter(y: Array) -> tuple[Array, Array]:
            return (y[:, :, comm.rank :],) * 2

        with pytest.raises(ValueError, match="make_kv") as raised:
            reference.cross_attention_layer_backward(out, saved, shorter, comm)
        return str(raised.value)

    text = (
        "make_kv: expected k and v as it made them in the forward, (((1, 1, 5, 3), 'float64'), "
        "((1, 1, 5, 3), 'float64')), got (((1, 1, 4, 3), 'float64'), ((1, 1, 4, 3), 'float64')) "
        "(on rank 1 of 2)"
    )
    assert run_ranks(2, layer) == [text] * 2


@pytest.mark.parametrize("implementation", [reference, mpi_impl], ids=["reference", "mpi"])
def test_options_are_passed_to_attention(implementation: Any) -> None:
    layer = Layer.make()
    mask = np.random.default_rng(1).random((B, 1, S_Q, S_KV)) < 0.6
    options = {"scale": 0.3, "mask": mask}
    p = layer.problem()
    backend = BACKENDS[0] if implementation is reference else MPI_NUMPY

    def run(comm: Any) -> Any:
        meter = implementation.Meter()
        layout = implementation.Layout.agree(p.q, p.k, p.v, comm, **options)
        run_layer(layer, comm, backend, layout=layout, meter=meter, **options)
        assert meter.computing > 0
        return run_layer(layer, comm, backend, **options)

    out, _, grads = run_ranks(1, run)[0] if implementation is reference else run(MPI.COMM_SELF)
    truth = naive_attention(p.q, p.k, p.v, 0.3, mask, p.dout, p.dlse)
    _, limit = layer.truth()
    assert ratio(out, truth.results["out"], limit["out"]) <= 1
    dx = np.einsum("bhsd,ehd->bse", truth.results["dq"], layer.w_q)
    off = projected(
        partial(np.einsum, "bhsd,ehd->bse"), limit["dq"], truth.sizes["dq"], layer.w_q, H * D
    )
    assert ratio(grads[0], dx, off) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_projection_gradients_have_accumulator_dtype(dtype: str) -> None:
    layer = Layer(*(getattr(Layer.make(), f.name).astype(dtype) for f in fields(Layer)))
    out, saved, grads = run_layer(layer, MPI.COMM_SELF, MPI_NUMPY)
    assert out.dtype == dtype
    # Partial sums are yet to be added up, of weights over the ranks: not in 16 bits.
    assert {x.dtype for x in grads} == {np.dtype("float32")}
    assert saved.lse.dtype == np.float32
