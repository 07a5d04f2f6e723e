"""Functions that break the contract: one clear line each, and the other cases run."""

import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lvxattn.check import Case, case_of, check
from lvxattn.check.time_limit import TimeIsUpError, TimeLimit
from tests.oracle import GAUSSIAN, TWO, checked, message, right, right_backward

HERE = __file__


def first_wrong(what: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose first call is `what`; after that it is right."""
    calls = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return what(q, k, v, mask)
        return right(q, k, v, scale=scale, mask=mask)

    return fn


def with_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a right function with this backward."""

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return right(q, k, v, scale=scale, mask=mask)

    fn.backward = backward  # type: ignore[attr-defined]
    return fn


def raiser(error: BaseException) -> Callable[..., Any]:
    def what(*_: Any, **options: Any) -> Any:
        raise error

    return what


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


# Broken contracts, and parts of the message.
WRONG: dict[str, tuple[Any, ...]] = {
    "None": (lambda q, k, v, mask: None, "out: expected an array of numpy on cpu, got None"),
    "a list": (lambda q, k, v, mask: [1, 2, 3], "expected out or (out, lse), got a list of 3"),
    "an empty tuple": (lambda q, k, v, mask: (), "a tuple of 0"),
    "a number": (lambda q, k, v, mask: 1.5, "out: ", "numpy", "builtins"),
    "numbers": (lambda q, k, v, mask: q.tolist(), "a list of 1"),
    "a shape": (lambda q, k, v, mask: q[0], "out: expected shape (1, 2, 64, 8), got (2, 64, 8)"),
    "a dtype": (
        lambda q, k, v, mask: q.astype(np.float32),
        "out: expected dtype float64, got float32",
    ),
    "lse's shape": (
        lambda q, k, v, mask: (q, q[..., :1]),
        "lse: ",
        "(1, 2, 64)",
        "(1, 2, 64, 1)",
    ),
    "lse's dtype": (
        lambda q, k, v, mask: (q, q[..., 0].astype(np.float16)),
        "lse: ",
        "float64",
        "float16",
    ),
    "sys.exit": (lambda q, k, v, mask: sys.exit(3), f"SystemExit: 3 ({HERE}:"),
    "Ctrl-C of its own": (raiser(KeyboardInterrupt()), f"KeyboardInterrupt ({HERE}:"),
    "not an Exception": (raiser(GeneratorExit("over")), f"GeneratorExit: over ({HERE}:"),
    "lines": (raiser(ValueError("one\n  two\tthree\n")), f"ValueError: one two three ({HERE}:"),
    "no text": (raiser(SilentError()), f"SilentError: a message that raises RuntimeError ({HERE}:"),
    "a warning": (lambda q, k, v, mask: warnings.warn("w", stacklevel=1), "UserWarning: w ("),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_results_are_reported_and_other_cases_run(name: str) -> None:
    what, *parts = WRONG[name]
    report = checked(first_wrong(what))
    assert [row.status for row in report.rows] == ["error", "ok"]
    assert all(part in report.rows[0].message for part in parts)
    assert report.rows[0].message in str(report)
    assert not report.passed


def test_error_names_the_users_line() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return np.linalg.inv(q[0, 0])  # 64 x 8

    line = fn.__code__.co_firstlineno + 1
    assert (
        message(fn) == f"LinAlgError: Last 2 dimensions of the array must be square ({HERE}:{line})"
    )


def test_long_message_is_shortened_to_one_line() -> None:
    text = message(raiser(RuntimeError("first\n" + "words\n" * 10_000 + "last")))
    assert "\n" not in text
    assert len(text) < 500
    assert text.startswith("RuntimeError: first words")
    assert " words last (" in text


def test_wrong_signature_message_shows_the_call() -> None:
    text = message(lambda q, k, v: q)
    assert "unexpected keyword argument" in text
    assert "fn(q, k, v, *, scale, mask)" in text
    text = message(with_backward(lambda dout, q, k, v, out, *, scale, mask: (q, k, v)))
    assert "takes 5 positional arguments but 6" in text
    assert "backward(dout, q, k, v, out, lse, *, scale, mask)" in text


# Hangs.


def loop(*_: Any) -> None:
    while True:
        pass


def stubborn(*_: Any) -> None:
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            if STOP.is_set():
                return
        if STOP.is_set():
            return


STOP = threading.Event()


@pytest.mark.parametrize("hang", [loop, lambda *_: time.sleep(2.5), lambda *_: STOP.wait(2.5)])
def test_hanging_call_is_reported_and_next_case_runs(
    hang: Callable[..., Any],
) -> None:
    report = checked(first_wrong(hang), time_limit=0.5)
    assert [row.status for row in report.rows] == ["error", "ok"]
    assert report.rows[0].message == "did not come back within 0.5 s"


def test_loop_is_interrupted_and_stuck_call_counted() -> None:
    assert not any(
        "could not be ended" in n for n in checked(first_wrong(loop), time_limit=0.5).notes
    )
    report = checked(first_wrong(stubborn), time_limit=0.5)
    STOP.set()
    assert any(
        n.startswith("calls that did not come back and could not be ended: 1,")
        for n in report.notes
    )


def test_time_limit_is_per_case() -> None:
    def slow(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        time.sleep(0.4)
        return right(q, k, v, scale=scale, mask=mask)

    assert checked(slow, [GAUSSIAN] * 3, time_limit=1.0).passed


def test_time_limit_drops_after_three_late_calls() -> None:
    def late(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        time.sleep(0.3)
        return right(q, k, v, scale=scale, mask=mask)

    messages = [row.message for row in checked(late, [GAUSSIAN] * 5, time_limit=0.2).rows]
    assert (
        messages == ["did not come back within 0.2 s"] * 3 + ["did not come back within 0.02 s"] * 2
    )


def test_leftover_thread_does_not_block_exit() -> None:
    program = (
        "import time\n"
        "from lvxattn.check import check, case_of\n"
        "def fn(q, k, v, *, scale, mask): time.sleep(1000)\n"
        "r = check(fn, cases=[case_of('one-key')], dtypes=['float64'], time_limit=0.1)\n"
        "print(r.rows[0].message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "did not come back within 0.1 s\n")
    shown = "lvxattn check: one-key, float64, seed 0"  # and, in the end, nothing
    assert done.stderr == f"\n{shown}\n{' ' * len(shown)}\n"  # each was a carriage return


def test_interrupt_reaches_only_its_call() -> None:
    timer = TimeLimit(0.001)
    for n in range(30):  # calls that end just at the limit
        timer.seconds = 0.0005 * (n % 4)
        with suppress(TimeIsUpError):
            assert timer.call(lambda: time.sleep(0.0005) or "came back") == "came back"
    timer.seconds = 30
    assert timer.call(lambda: "came back") == "came back"
    timer.close()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_check_and_call() -> None:
    ended = threading.Event()

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        # Like a terminal's: to the waiting thread.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            loop()
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        checked(fn, time_limit=20)
    assert ended.wait(30)


# Modified arguments, reused memory.


def writes(name: str) -> Callable[..., Any]:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        results = right(q, k, v, scale=scale, mask=mask)
        x = {"q": q, "k": k, "v": v, "mask": mask}.get(name)
        if x is not None:
            x[0, 0, 0, 0] = ~x[0, 0, 0, 0] if x.dtype == bool else np.nan
        return results

    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any) -> Any:
        results = right_backward(dout, q, k, v, out, lse, **options)
        x = {"dout": dout, "out": out, "lse": lse}.get(name)
        if x is not None:
            x[0, 0, 0] = np.nan
        return results

    fn.backward = backward  # type: ignore[attr-defined]
    return fn


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "dout"])
def test_written_argument_is_reported(name: str) -> None:
    case = case_of("random-mask")
    text = message(writes(name), case)
    assert text.startswith(f"{name}: was written into (")
    read_only = Case("read-only", "", "", B=2, S_Q=9, mask="random", memory="read-only")
    assert "ValueError: assignment destination is read-only" in message(writes(name), read_only)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_backward_writing_forward_results_is_reported(name: str) -> None:
    assert message(writes(name)).startswith(f"{name}: was written into by the backward (")


def test_result_changed_by_next_call_is_reported() -> None:
    kept: dict[Any, Any] = {}

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        out, _ = right(q, k, v, scale=scale, mask=mask)
        buffer = kept.setdefault((q.shape, q.dtype), np.empty_like(out))
        buffer[...] = out
        return buffer[:]

    assert checked(fn, [GAUSSIAN]).passed
    text = message(fn, case_of("backward-before"))
    assert text.startswith("out: was changed by the next call: its memory is used again (272 of")


def test_returned_argument_is_judged() -> None:
    (row,) = checked(lambda q, k, v, *, scale, mask: q, [GAUSSIAN]).rows
    assert row.status == "wrong"


# Backwards.


BACKWARDS: dict[str, tuple[Any, ...]] = {
    "None": (lambda *a, **o: None, "backward: expected (dq, dk, dv), got None"),
    "two": (lambda *a, **o: a[1:3], "backward: ", "a tuple of 2"),
    "None for k": (lambda dout, q, *a, **o: (q, None, q), "dk: ", "numpy", "None"),
    "one shape": (lambda dout, q, *a, **o: (q, q, q), "dk: ", "(1, 2, 128, 8)"),
    "raises": (
        raiser(ZeroDivisionError("in it")),
        f"the backward: ZeroDivisionError: in it ({HERE}:",
    ),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_bad_backward_is_reported(name: str) -> None:
    backward, start, *parts = BACKWARDS[name]
    large = Case("large", "", "", S_Q=64, S_KV=128)
    text = message(with_backward(backward), large)
    assert text.startswith(start)
    assert all(part in text for part in parts)


def test_backward_unsupported_for_some_cases() -> None:
    def backward(dout: Any, q: Any, *rest: Any, **options: Any) -> Any:
        if options["mask"] is not None:
            raise NotImplementedError("no masks\nyet")
        return right_backward(dout, q, *rest, **options)

    report = checked(with_backward(backward), [GAUSSIAN, case_of("dead-rows")])
    assert report.passed
    assert [[v.name for v in row.verdicts] for row in report.rows] == [
        ["out", "lse", "dq", "dk", "dv"],
        ["out", "lse"],
    ]
    why = "the backward raised NotImplementedError: no masks yet"
    assert report.notes == (f"no gradients in 1 of 2: {why}",)
    report = checked(with_backward(raiser(NotImplementedError())), TWO)
    assert report.notes == ("forward only: the backward raised NotImplementedError",)


def test_backward_gets_forward_results() -> None:
    given: list[Any] = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        given[:] = right(q, k, v, scale=scale, mask=mask)
        return tuple(given)

    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any) -> Any:
        assert out is given[0]
        assert lse is given[1]
        return right_backward(dout, q, k, v, out, lse, **options)

    assert checked(fn, [GAUSSIAN], backward=backward).passed


def test_gradients_are_not_computed_if_not_requested() -> None:
    report = checked(with_backward(raiser(AssertionError())), backward=False)
    assert report.passed
    assert report.notes == ()


def test_unsupported_cases_neither_fail_nor_pass() -> None:
    report = checked(first_wrong(raiser(NotImplementedError("not\nthis"))))
    assert [row.status for row in report.rows] == ["unsupported", "ok"]
    assert report.rows[0].message == "not this"
    assert report.passed
    report = checked(raiser(NotImplementedError()))
    assert not report.passed
    assert "nothing was judged" in str(report)
    with pytest.raises(AssertionError, match="nothing was judged"):
        report.raise_if_failed()


# Settings outside and inside of a call.


def test_numpy_error_state_is_the_callers() -> None:
    seen = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        seen.append(np.geterr()["over"])
        np.seterr(over="print")
        with np.errstate(all="ignore"):
            return right(q, k, v, scale=scale, mask=mask)

    with np.errstate(all="raise"):  # which does not disturb the check itself
        half = ["float16", "bfloat16", "float64"]
        assert checked(fn, [case_of("scores-600"), case_of("lse-low")], half).passed
        assert np.geterr()["over"] == "raise"
    assert set(seen) == {"raise"}


def test_floating_point_errors_are_attributed_to_the_function() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return np.exp(1000 * abs(q)), None

    with np.errstate(over="raise"):
        assert message(fn).startswith("FloatingPointError: overflow encountered in exp")


def test_partial_keeps_its_name() -> None:
    assert check(partial(right), cases=[GAUSSIAN]).target == "tests.oracle:right"


# A right forward whose backward fails, and what is refused in the function's own words.


class Raises:
    """Attention in PyTorch whose gradients fail; `when` inputs require them, or later."""

    def __init__(self, when: str, error: type[Exception]) -> None:
        self.when, self.error = when, error

    def __call__(self, q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        if q.requires_grad and self.when == "forward":
            raise self.error("no gradients on CPUs")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        if q.requires_grad:
            out.register_hook(self._raise)
        return out

    def _raise(self, dout: Any) -> Any:
        raise self.error("no gradients on CPUs")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_right_forward_is_judged_where_the_backward_raises(when: str) -> None:
    report = checked(Raises(when, RuntimeError), [GAUSSIAN], framework="torch")
    (found,) = report.rows
    assert found.status == "error"
    assert [(v.name, v.passed) for v in found.verdicts] == [("out", True)]
    assert found.message.startswith("the backward: RuntimeError: no gradients on CPUs (")
    assert "the backward raised in 1; the forward alone is right in 1 of 1" in report.notes
    assert not report.passed


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_refused_gradients_leave_a_forward_that_passes(when: str) -> None:
    report = checked(Raises(when, NotImplementedError), [GAUSSIAN], framework="torch")
    assert report.passed
    assert "NotImplementedError: no gradients on CPUs" in report.notes[0]


def test_a_forward_that_raises_in_any_case_is_an_error_of_the_forward() -> None:
    report = checked(raiser(RuntimeError("broken")), [GAUSSIAN], framework="torch")
    (found,) = report.rows
    assert (found.status, found.verdicts) == ("error", ())
    assert found.message.startswith("RuntimeError: broken")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Q/K/V should have the same head size", "unsupported"),
        ("expected the value dimension of v to be that of q", "unsupported"),
        ("operands could not be broadcast together with shapes (2,9) (2,17)", "error"),
    ],
)
def test_other_values_refused_by_own_words_are_unsupported(text: str, status: str) -> None:
    (other,) = checked(raiser(ValueError(text)), [case_of("value-size")]).rows
    assert other.status == status
    (equal,) = checked(raiser(ValueError(text)), [GAUSSIAN]).rows
    assert equal.status == "error"


def test_no_other_dtype_is_called_than_those_of_the_check() -> None:
    called = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        called.append(q.dtype.name)
        return right(q, k, v, scale=scale, mask=mask)

    case = case_of("other-dtype-before")
    assert check(fn, dtypes=["float32"], cases=[case]).passed
    assert called == ["float32"]
    assert check(fn, dtypes=["float32", "float16"], cases=[case]).passed
    assert called[1:] == ["float16", "float32", "float32", "float16"]
