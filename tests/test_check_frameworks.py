"""Arrays of other libraries: lossless conversion, and gradients by each library's autograd."""

import builtins
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from lvxattn.check import Case, case_of
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.mpi_impl import block_attention, block_attention_backward
from tests import fake_cupy
from tests.errors import says
from tests.oracle import GAUSSIAN, checked, message, plain, right

HALF = np.dtype(ml_dtypes.bfloat16)
NAMES = ("numpy", "torch", "jax", "cupy")
SIX = [
    *map(case_of, ("gaussian", "callable-mask", "finite-minimum")),
    *map(case_of, ("everything-dead", "grouped-heads", "backward-before")),
]


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in be CuPy, and be found anew."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.delitem(sys.modules, "lvxattn.check.frameworks.cupy_arrays", raising=False)


@pytest.fixture(params=NAMES)
def framework(request: pytest.FixtureRequest) -> Framework:
    return framework_of(request.param)


def of_queries(fn: Any) -> Any:
    """Return a function to be checked that calls fn with q only."""
    return lambda q, k, v, *, scale, mask: fn(q)


# No module has a partial under its name: they run in this process, where the libraries are loaded.
in_torch = partial(plain, torch, double=torch.float64)
in_jax = partial(plain, jnp, double=jnp.float32)


def fail(*found: Any) -> Any:
    raise ZeroDivisionError("in it")


def refuse(*found: Any) -> Any:
    raise NotImplementedError("no backward yet")


# Conversions.


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "broadcast", "read-only"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool"])
def test_arrays_round_trip(framework: Framework, dtype: str, memory: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 3, 5))
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    x = np.broadcast_to(x, (2, 4, 3, 5)) if memory == "broadcast" else x
    x = x.astype(HALF if dtype == "bfloat16" else dtype)
    if dtype in framework.missing:
        return
    before = x.copy()
    with framework.active():
        there = framework.put(x, memory)
        assert framework.owns(there)
        assert tuple(there.shape) == x.shape
        assert str(there.dtype).removeprefix("torch.") == dtype
        back = framework.get(there)
    assert back.dtype == (bool if dtype == "bool" else np.float64)
    np.testing.assert_array_equal(back, x.astype(back.dtype))
    back[...] = 0  # a copy
    with framework.active():
        np.testing.assert_array_equal(framework.get(there), before.astype(back.dtype))


def strides(x: Any) -> tuple[int, ...]:
    return x.stride() if isinstance(x, torch.Tensor) else tuple(n // x.itemsize for n in x.strides)


@pytest.mark.parametrize("name", ["numpy", "torch", "cupy"])
def test_strides_match_the_case(name: str) -> None:
    framework = framework_of(name)
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 5))
    same = np.broadcast_to(x[:, :1], x.shape)
    assert strides(framework.put(x)) == (60, 15, 5, 1)
    assert strides(framework.put(x, "transposed")) == (60, 15, 1, 3)
    assert strides(framework.put(same, "broadcast"))[1] == 0
    assert strides(framework.put(x, "broadcast"))[1] == 15  # not the same: nothing to share
    if name == "numpy":
        assert not framework.put(x, "read-only").flags.writeable
        assert framework.put(x).flags.writeable


def test_put_copies(framework: Framework) -> None:
    x = np.zeros((1, 1, 2, 2), np.float32)
    there = framework.put(x)
    x[...] = 1
    assert not framework.get(there).any()


def test_arrays_of_other_libraries_are_not_owned(framework: Framework) -> None:
    for name in NAMES:
        other = framework_of(name).put(np.zeros(2, np.float32))
        assert framework.owns(other) == (name == framework.name)
    for x in (None, 1.5, [1.0], np.float32(1)):
        assert not framework.owns(x)


# Right functions in every library.


def test_correct_torch_functions_pass_in_every_dtype() -> None:
    report = checked(
        in_torch, SIX, ["float64", "float32", "float16", "bfloat16"], framework="torch"
    )
    report.raise_if_failed()
    # Without a term in it that needs one, nothing gives a gradient: a row of -inf has one of 0.
    assert report.notes == ()
    assert all(len(row.verdicts) == 5 for row in report.rows)


def test_correct_jax_functions_pass() -> None:
    # Every case is compiled anew, so there are few; other tests have some that are not jitted.
    report = checked(jax.jit(in_jax), SIX[1:5], ["bfloat16"], framework="jax")
    report.raise_if_failed()
    assert report.notes == ()
    assert all(len(row.verdicts) == 5 for row in report.rows)


def test_correct_functions_on_async_device_pass() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        out, lse = block_attention(q, k, v, scale=scale, mask=mask)
        return out.astype(q.dtype), lse

    def backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, scale: float, mask: Any
    ) -> Any:
        delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(axis=-1)
        dk, dv = (fake_cupy.zeros(x.shape, lse.dtype) for x in (k, v))
        dq = block_attention_backward(dout, q, k, v, lse, delta, dk, dv, scale=scale, mask=mask)
        return tuple(x.astype(q.dtype) for x in (dq, dk, dv))

    report = checked(
        fn, SIX, ["float64", "float32", "bfloat16"], framework="cupy", backward=backward
    )
    report.raise_if_failed()
    assert all(len(row.verdicts) == 5 for row in report.rows)
    report = checked(fn, framework="cupy")
    assert report.notes == ("forward only: CuPy has no autograd, and the function no backward",)


# Libraries and devices that are not there.


@pytest.mark.parametrize("name", ["torch", "jax", "cupy"])
def test_missing_library_raises_with_install_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lvxattn.check.frameworks.{name}_arrays", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=f"^framework: {name} is not installed: pip install {name}"
    ):
        checked(right, framework=name)


def test_failed_import_inside_a_library_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def fail(name: str, *rest: Any) -> ModuleType:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ModuleNotFoundError, match="fastrlock"):
        framework_of("cupy")


def test_frameworks_import_only_their_own_library() -> None:
    program = (
        "import sys\n"
        "from lvxattn.check import check, case_of\n"
        "check(lambda q, k, v, *, scale, mask: q, cases=[case_of('one-key')])\n"
        "print([name for name in ('torch', 'jax', 'cupy') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("numpy", "cuda"),
        ("numpy", 0),
        ("torch", "cuda:99"),
        ("torch", 99),
        ("torch", "nowhere"),
        ("torch", "meta"),
        ("torch", 1.5),
        ("jax", "tpu"),
        ("jax", "cpu:99"),
        ("jax", 99),
        ("cupy", "cpu"),
        ("cupy", "cuda:x"),
        ("cupy", 1),
    ],
)
def test_missing_device_raises(name: str, device: Any) -> None:
    with pytest.raises(ValueError, match=f"^device: .*{device}"):
        framework_of(name, device)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("numpy", ["cpu"]),
        ("torch", ["cpu"]),
        ("jax", ["cpu", "cpu:0", 0, "0"]),
        ("cupy", ["cuda", "cuda:0", 0, "0"]),
    ],
)
def test_a_device_has_several_names(name: str, devices: list[Any]) -> None:
    default = framework_of(name)
    for device in devices:
        framework = framework_of(name, device)
        assert framework.device == default.device
        assert framework.owns(framework.put(np.zeros(1, np.float32)))


def test_unknown_framework_raises() -> None:
    with pytest.raises(
        ValueError, match=r"^framework: expected one of numpy, torch, jax, cupy, got"
    ):
        framework_of("tensorflow")


def test_bfloat16_is_skipped_without_ml_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["lvxattn.check.frameworks"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    report = checked(in_torch, [GAUSSIAN], None, framework="torch")
    assert [row.dtype for row in report.rows] == ["float32"]
    assert "bfloat16 was left out: it needs ml_dtypes: pip install ml_dtypes" in report.notes
    with pytest.raises(
        ValueError, match=r"^dtypes: .* got 'bfloat16', which was left out: it needs"
    ):
        checked(in_torch, [GAUSSIAN], ["bfloat16"], framework="torch")


def test_bfloat16_is_skipped_without_cupy_support(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fake_cupy.asarray

    def refuse(x: Any) -> Any:
        if str(x.dtype) == "bfloat16":
            raise ValueError("Unsupported dtype bfloat16")
        return taken(x)

    monkeypatch.setattr(fake_cupy, "asarray", refuse)
    framework = framework_of("cupy")
    assert framework.dtypes == ("float64", "float32", "float16")
    assert framework.missing == {"bfloat16": "CuPy 14: ValueError: Unsupported dtype bfloat16"}


# PyTorch.


def torch_message(fn: Any, **options: Any) -> str:
    return message(fn, framework="torch", **options)


def torch_notes(fn: Any) -> tuple[str, ...]:
    report = checked(fn, [GAUSSIAN], framework="torch")
    assert report.passed
    return report.notes


class Attention(torch.autograd.Function):
    """Attention with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, change: Any) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.change = change
        return in_torch(q, k, v, scale=q.shape[-1] ** -0.5, mask=None)[0]

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = in_torch(*leaves, scale=leaves[0].shape[-1] ** -0.5, mask=None)[0]
        return *ctx.change(*torch.autograd.grad(out, leaves, dout)), None


def own(change: Any) -> Any:
    return lambda q, k, v, *, scale, mask: Attention.apply(q, k, v, change)


def test_autograd_function_gradients_are_judged_in_any_layout() -> None:
    def transposed(*found: Any) -> Any:
        return tuple(x.mT.contiguous().mT for x in found)

    for change in (lambda *found: found, transposed):
        for case in (GAUSSIAN, case_of("stride-0"), case_of("non-contiguous")):
            (row,) = checked(own(change), [case], framework="torch").rows
            assert row.status == "ok"
            assert [v.name for v in row.verdicts] == ["out", "dq", "dk", "dv"]
    report = checked(own(lambda dq, dk, dv: (dq, 2 * dk, dv)), [GAUSSIAN], framework="torch")
    assert [v.name for v in report.rows[0].verdicts if not v.passed] == ["dk"]


def test_missing_gradient_counts_as_zero() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return in_torch(q, k.detach(), v, scale=scale, mask=mask)

    (row,) = checked(fn, [GAUSSIAN], framework="torch").rows
    assert [v.name for v in row.verdicts if not v.passed] == ["dk"]
    report = checked(own(lambda dq, dk, dv: (dq, None, dv)), [GAUSSIAN], framework="torch")
    assert [v.name for v in report.rows[0].verdicts if not v.passed] == ["dk"]


def test_error_in_autograd_backward_is_reported() -> None:
    text = torch_message(own(fail))
    assert text.startswith(f"the backward: ZeroDivisionError: in it ({__file__}:")
    assert "invalid gradient" in torch_message(own(lambda dq, dk, dv: (dq[..., :1], dk, dv)))
    why = "the backward raised NotImplementedError: no backward yet"
    assert torch_notes(own(refuse)) == (
        f"forward only: {why}",
        "no lse was returned, and none judged",
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_function_without_gradients_fails_unless_forward_only(
    mode: Any,
) -> None:
    fn = mode()(in_torch)
    report = checked(fn, [GAUSSIAN], framework="torch")
    assert [(row.case, row.status) for row in report.rows] == [
        (GAUSSIAN.name, "ok"),
        ("gradients", "error"),
    ]
    assert report.rows[1].message.startswith("none in any case: out does not require grad;")
    assert report.notes == ("forward only: out does not require grad",)
    assert checked(fn, [GAUSSIAN], framework="torch", backward=False).passed


@pytest.mark.slow
def test_compiled_function_is_checked_for_all_shapes() -> None:
    as_written = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        if not torch.compiler.is_compiling():
            as_written.append(q.shape)
        return in_torch(q, k, v, scale=scale, mask=mask)

    compiled = torch.compile(fn, backend="eager", dynamic=False)
    cases = [replace(GAUSSIAN, name=f"{n} keys", S_KV=n) for n in range(20, 32)]
    assert checked(compiled, cases, framework="torch").passed
    assert as_written == []


def test_grad_mode_of_caller_is_independent() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        result = in_torch(q, k, v, scale=scale, mask=mask)
        torch.set_grad_enabled(False)
        return result

    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert checked(in_torch, [GAUSSIAN], framework="torch").notes == ()
    report = checked(fn, [GAUSSIAN] * 2, framework="torch")
    assert report.passed
    assert report.notes == ()
    assert torch.is_grad_enabled()


def test_compiled_functions_and_modules_are_checked() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
            return in_torch(q, k, v, scale=scale, mask=mask)

    compiled = torch.compile(
        lambda q, k, v, *, scale, mask: in_torch(q, k, v, scale=scale, mask=mask), backend="eager"
    )
    for fn in (Module(), compiled):
        report = checked(fn, [GAUSSIAN, case_of("dead-rows")], framework="torch")
        report.raise_if_failed()
        assert report.notes == ()


def test_bad_torch_results_are_reported() -> None:
    for fn, expected in (
        (lambda q: q.numpy(force=True), says("out", "torch", "numpy.ndarray")),
        (lambda q: q.to("meta"), says("out", "cpu", "torch.Tensor on meta")),
        (lambda q: q.float(), says("out", "float64", "float32")),
        (lambda q: q[0], says("out", (2, 32, 8))),
        (lambda q: (), "a tuple of 0"),
        (lambda q: q.to_sparse(), "^out: cannot be read: "),
    ):
        assert re.search(expected, torch_message(of_queries(fn)))
    assert checked(partial(in_torch), [GAUSSIAN], framework="torch").passed


def test_written_tensors_are_reported() -> None:
    def into(name: str) -> Any:
        def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
            result = in_torch(q, k, v, scale=scale, mask=mask)
            {"q": q, "v": v}[name].data[0, 0, 0, 0] += 1
            return result

        return fn

    def into_dout(dq: Any, dk: Any, dv: Any) -> Any:
        return dq, dk, dv

    for name in ("q", "v"):
        assert torch_message(into(name)).startswith(f"{name}: was written into (1 of ")

    class Writer(Attention):
        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            found = Attention.backward(ctx, dout)
            dout.zero_()
            return found

    wrong = torch_message(lambda q, k, v, *, scale, mask: Writer.apply(q, k, v, into_dout))
    assert wrong.startswith("dout: was written into (")


def test_all_dead_rows_are_judged_forward() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        if mask is None:
            return in_torch(q, k, v, scale=scale, mask=mask)
        return torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)

    report = checked(fn, [case_of("everything-dead"), GAUSSIAN], framework="torch")
    assert report.passed
    assert report.notes == ("no gradients in 1 of 2: out does not require grad",)


# JAX.


def jax_checked(fn: Any, cases: Any = (GAUSSIAN,), dtypes: Any = ("float32",)) -> Any:
    return checked(fn, cases, dtypes, framework="jax")


def test_float64_is_skipped_without_jax_x64() -> None:
    report = checked(jax.jit(in_jax), [GAUSSIAN] * 2, None, framework="jax", suite="full")
    assert {row.dtype for row in report.rows} == {"float32", "float16", "bfloat16"}
    assert report.notes == ("float64 was left out: jax_enable_x64 is off",)
    assert checked(jax.jit(in_jax), [GAUSSIAN], None, framework="jax").notes == ()
    with pytest.raises(ValueError, match="'float64', which was left out: jax_enable_x64 is off"):
        jax_checked(in_jax, dtypes=["float64"])


def test_jax_x64_of_caller_thread_applies() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return plain(jnp, q, k, v, scale, mask, jnp.float64)

    with jax.enable_x64(True):
        report = jax_checked(jax.jit(fn), dtypes=["float64"])
    report.raise_if_failed()
    assert all(len(row.verdicts) == 5 for row in report.rows)


def test_nondifferentiable_jax_functions_are_checked_forward() -> None:
    def to_host(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return tuple(
            jnp.asarray(x, jnp.float32)
            for x in right(*map(np.asarray, (q, k, v)), scale=scale, mask=mask)
        )

    def callback(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        def host(*x: Any) -> Any:
            return right(*map(np.asarray, x), scale=scale, mask=None)[0]

        return jax.pure_callback(host, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v)

    def loop(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        out, lse = in_jax(q, k, v, scale=scale, mask=mask)
        start = 0, out / 2
        return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: (x[0] + 1, 2 * x[1]), start)[1], lse

    for fn, why in (
        (to_host, "TracerArrayConversionError"),
        (callback, "ValueError: Pure callbacks do not support JVP"),
        (loop, "the backward raised NotImplementedError: Reverse-mode differentiation"),
    ):
        report = jax_checked(fn)
        assert report.rows[0].status == "ok"
        assert report.passed == ("NotImplementedError" in why)
        assert report.notes[0].startswith(f"forward only: {why}")


def test_gradients_of_a_custom_vjp_are_judged() -> None:
    def with_vjp(backward: Any) -> Any:
        @jax.custom_vjp
        def attend(q: Any, k: Any, v: Any) -> Any:
            return in_jax(q, k, v, scale=q.shape[-1] ** -0.5, mask=None)[0]

        def forward(q: Any, k: Any, v: Any) -> Any:
            return jax.vjp(lambda *x: in_jax(*x, scale=q.shape[-1] ** -0.5, mask=None)[0], q, k, v)

        attend.defvjp(forward, lambda pull, dout: backward(*pull(dout)))
        return lambda q, k, v, *, scale, mask: attend(q, k, v)

    (row,) = jax_checked(with_vjp(lambda *found: found)).rows
    assert row.status == "ok"
    (row,) = jax_checked(with_vjp(lambda dq, dk, dv: (dq, 2 * dk, dv))).rows
    assert [v.name for v in row.verdicts if not v.passed] == ["dk"]
    (row,) = jax_checked(with_vjp(fail)).rows
    assert row.message.startswith(f"the backward: ZeroDivisionError: in it ({__file__}:")
    report = jax_checked(with_vjp(refuse))
    assert report.passed
    assert report.notes[0].endswith("NotImplementedError: no backward yet")


def test_bad_jax_results_are_reported() -> None:
    leaked: list[Any] = []

    def leak(q: Any) -> Any:
        jax.jit(lambda x: leaked.append(x))(q)
        return leaked.pop()

    def late(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        def host(x: Any) -> Any:
            raise ZeroDivisionError("in it")

        return jax.pure_callback(host, jax.ShapeDtypeStruct(q.shape, q.dtype), q)

    donating = jax.jit(lambda q: q + 1, donate_argnums=0)
    for fn, expected in (
        (lambda q: np.asarray(jnp.ones(3)), says("out", "jax", "numpy.ndarray")),
        (lambda q: None, says("out", "jax on cpu:0", None)),
        (lambda q: (q, None, q), "a tuple of 3"),
        (lambda q: q[0], says("out", (1, 2, 32, 8), (2, 32, 8))),
        (lambda q: q.astype(jnp.bfloat16), says("out", "float32", "bfloat16")),
        (leak, says("out", "jax on cpu:0", "got jax")),
    ):
        (row,) = jax_checked(of_queries(fn)).rows
        assert row.status == "error"
        assert re.search(expected, row.message)
    (row,) = jax_checked(late).rows  # raised in the call or when out is read: JAX decides
    assert "ZeroDivisionError: in it" in row.message
    options = {"framework": "jax", "backward": False}
    (row,) = checked(of_queries(donating), [GAUSSIAN], ["float32"], **options).rows
    assert row.message.startswith("q: was written into: RuntimeError: Array has been deleted")


# CuPy.


def test_get_waits_for_the_device() -> None:
    framework = framework_of("cupy")
    x = framework.put(np.arange(4.0))
    assert framework.get(x + 1).tolist() == [1, 2, 3, 4]


def test_numpy_result_from_cupy_function_is_reported() -> None:
    text = message(of_queries(fake_cupy.asnumpy), framework="cupy")
    assert re.search(says("out", "cupy on cuda:0", "numpy.ndarray on cpu"), text)


def test_array_on_another_device_is_reported() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        out = fake_cupy.zeros(q.shape, q.dtype)
        there = {"device": fake_cupy.cuda.Device(1), "__module__": "fake_cupy"}
        out.__class__ = type("ndarray", (fake_cupy.ndarray,), there)
        return out

    text = message(fn, framework="cupy")
    assert re.search(says("out", "cupy on cuda:0", "fake_cupy.ndarray on"), text)


def test_written_device_array_is_reported() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        out, _ = block_attention(q, k, v, scale=scale, mask=mask)
        k[0] = 0
        return out

    assert message(fn, framework="cupy").startswith("k: was written into (")


def test_zero_strides_are_passed(framework: Framework) -> None:
    case = Case("s", "", "", memory="broadcast")
    seen: list[Any] = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        seen.extend((q, k, v))
        raise NotImplementedError

    checked(fn, [case], ["float32"], framework=framework.name, backward=False)
    if framework.name != "jax":  # its arrays have no strides
        assert [strides(x)[1] == 0 for x in seen] == [False, True, True]
