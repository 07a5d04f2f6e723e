"""The pytest plugin: conformance tests, the fixture, the list of known failures."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

# Before pytester resets sys.modules after a run: these cannot be imported twice.
import ml_dtypes  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch  # noqa: F401

import lvxattn.check.frameworks.torch_arrays
import lvxattn.check.pytest_cases  # noqa: F401
from lvxattn.check import suite_of
from lvxattn.check.covering import pairs
from tests.check_kernels import SOURCE
from tests.launch import ROOT

pytest_plugins = ["pytester"]

CONFORMANCE = ("--pyargs", "lvxattn.check.conformance")
FLOAT32 = ("--lvx-dtypes", "float32")
COUNT = len(suite_of("quick"))


@pytest.fixture
def run(pytester: pytest.Pytester):  # type: ignore[no-untyped-def]
    """Run pytest in a folder with kernels, and return its result."""
    pytester.makepyfile(kernels=SOURCE)

    def run(*args: str) -> pytest.RunResult:
        options = ("-p", "lvxattn.pytest_plugin", "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*options, *args)

    return run


def test_correct_function_conforms(run) -> None:
    done = run(*CONFORMANCE, "--lvx-impl", "kernels:right", *FLOAT32, "--lvx-seeds", "2")
    done.assert_outcomes(passed=2 * COUNT + 1)  # and that something was judged
    assert done.ret == 0


def test_a_function_that_does_nothing_fails(run) -> None:
    done = run(*CONFORMANCE, "--lvx-impl", "kernels:refuses", *FLOAT32)
    done.assert_outcomes(skipped=COUNT, failed=1)
    done.stdout.fnmatch_lines([f"nothing was judged: {COUNT} unsupported"])


def test_test_ids_are_case_dtype_and_seed(run) -> None:
    line = [*CONFORMANCE, "--lvx-impl", "kernels:right", "--lvx-seeds", "2", "--co", "-q"]
    done = run(*line, "--lvx-dtypes", "float32,bfloat16", "-k", "one-query")
    names = [text.partition("::")[2] for text in done.outlines if "::" in text]
    assert names == [
        "test_attention[one-query-float32]",
        "test_attention[one-query-float32-seed1]",
        "test_attention[one-query-bfloat16]",
        "test_attention[one-query-bfloat16-seed1]",
    ]
    done = run(*line, "--lvx-suite", "full", *FLOAT32, "-k", "gaussian.large")
    assert "test_attention[gaussian.large-float32]" in str(done.stdout)


def test_failure_is_short_and_shows_how_to_reproduce(run) -> None:
    line = ["--lvx-impl", "kernels:nan", *FLOAT32, "-k", "dead-rows or callable or plain", "-rs"]
    done = run(*CONFORMANCE, *line)
    done.assert_outcomes(failed=1, skipped=1)
    done.stdout.fnmatch_lines(
        [
            "dead-rows-float32: some rows see nothing*",
            "  out: * NaN of * elements where they should not be; at (0, 0, 1, 0) got nan*",
            "  again: python -m lvxattn.check kernels:nan --case dead-rows --seed 0 *",
            "*SKIPPED*unsupported: no callable masks",
        ]
    )
    for inner in ("suite.py", "call_kernel.py", "time_limit.py", "Traceback", "hidden"):
        assert inner not in str(done.stdout)


def test_function_that_ends_its_process_fails_one_test(run) -> None:
    line = [*CONFORMANCE, "--lvx-impl", "kernels:exits", *FLOAT32]
    done = run(*line, "-k", "gaussian or ragged or one-key or judged")
    done.assert_outcomes(failed=1, passed=3)
    done.stdout.fnmatch_lines(
        [
            "gaussian-float32: a plain problem*",
            "  ExitError: os._exit(0) would have ended the check (*kernels.py:*",
            "  again: python -m lvxattn.check kernels:exits --case gaussian --seed 0 *",
        ]
    )


def test_named_backward_is_checked(run) -> None:
    line = [*CONFORMANCE, "--lvx-impl", "kernels:Kernels.right", *FLOAT32, "-k", "gaussian"]
    run(*line, "--lvx-backward", "kernels:back").assert_outcomes(passed=1)
    done = run(*line, "--lvx-backward", "kernels:wrong_back")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["  dv: relative error 1.0e+00*"])


RIGHT = ("--lvx-impl", "kernels:right")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "lvxattn.check.conformance needs --lvx-impl package.module:function"),
        (("--lvx-impl", "nowhere:f"), "--lvx-impl: no module 'nowhere'"),
        (("--lvx-impl", "kernels:rihgt"), "did you mean right"),
        (
            (*RIGHT, "--lvx-dtypes", "fp32"),
            r"--lvx-dtypes: expected some of .* with numpy, got 'fp32'",
        ),
        ((*RIGHT, "--lvx-suite", "slow"), "--lvx-suite: .*'slow'"),
        (
            (*RIGHT, "--lvx-seeds", "0"),
            "--lvx-seeds: expected a whole number from 1 up, got",
        ),
        ((*RIGHT, "--lvx-framework", "tf"), "--lvx-framework: .*'tf'"),
        (("--lvx-backward", "kernels:back"), "--lvx-backward: goes with --lvx-impl"),
        (("--lvx-xfails-file", "nowhere"), "nowhere cannot be read"),
        (("--lvx-xfails-file", "fifo"), "fifo cannot be read: expected a regular file, got a FIFO"),
    ],
)
def test_bad_usage_prints_one_line(run, options: tuple[str, ...], words: str) -> None:
    if options[:1] == ("--lvx-xfails-file",):
        options = ("--lvx-impl", "kernels:right", *options)
        os.mkfifo("fifo")  # has no other end: who opens it waits
    done = run(*CONFORMANCE, *options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    told = [line for line in done.outlines + done.errlines if line.startswith("ERROR")]
    assert len(told) == 1
    assert re.search(words, told[0])
    assert "Traceback" not in str(done.stdout) + str(done.stderr)


class TestKnownFailures:
    """Lines of the file match tests, and a line without a match is an error."""

    FAILING = (
        "minus-infinity-float32  # by case and dtype\n\n"
        "# by the test's name\n"
        "test_attention[dead-rows-float32]\n"
        "everything-dead-*\n"
        "dead-shard.large-float32\n"  # not in this suite
        "minus-infinity-bfloat16\n"  # not among these dtypes
    )

    def line(self, pytester: pytest.Pytester, text: str) -> list[str]:
        pytester.makefile(".txt", xfails=text)
        file = ("--lvx-xfails-file", "xfails.txt")
        return [*CONFORMANCE, "--lvx-impl", "kernels:nan", *FLOAT32, *file]

    def test_they_are_expected(self, run, pytester: pytest.Pytester) -> None:
        done = run(*self.line(pytester, self.FAILING), "-rx", "-k", "not pairs")
        done.assert_outcomes(xfailed=3, skipped=1, passed=COUNT - len(pairs()) - 3)
        assert done.ret == 0
        assert "xfails.txt:1" in str(done.stdout)

    def test_unexpected_pass_fails_with_strict_xfail(self, run, pytester) -> None:
        line = [*self.line(pytester, self.FAILING + "gaussian-float32\n"), "-k", "gaussian"]
        run(*line).assert_outcomes(xpassed=1)
        run(*line, "-o", "xfail_strict=true").assert_outcomes(failed=1)

    @pytest.mark.parametrize(
        "typo",
        [
            "gausian-float32",
            "gaussian-float23",
            "gaussian-float32-seedx",
            "test_atention[gaussian-float32]",
            "test_attention[gausian-float32]",
            "gausian-*",
            "gaussian",
            "dead-row[s]-float32",
        ],
    )
    def test_unknown_expected_failure_is_an_error(self, run, pytester, typo: str) -> None:
        done = run(*self.line(pytester, f"# known\n{self.FAILING}{typo}\n"))
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        assert f"xfails.txt:9: no test is called {typo!r}" in "".join(done.errlines + done.outlines)

    def test_expected_failures_are_checked_under_selection(
        self, run, pytester: pytest.Pytester
    ) -> None:
        line = self.line(pytester, self.FAILING)
        run(*line, "-k", "minus-infinity").assert_outcomes(xfailed=1)
        assert run(*line, "--co", "-q").ret == 0
        line[1] += "::test_attention[minus-infinity-float32]"
        run(*line).assert_outcomes(xfailed=1)

    def test_expected_failures_of_own_tests_are_checked_under_selection(
        self, run, pytester
    ) -> None:
        test = "def test_{0}(xattn_case):\n    assert 0\n"
        pytester.makepyfile(test_own=test.format("a") + test.format("b"))
        pytester.makefile(".txt", xfails="test_b[one-key-float32]\ntest_a[one-key-float32]\n")
        line = ["--lvx-xfails-file", "xfails.txt", *FLOAT32, "-k", "one-key"]
        run("test_own.py", *line).assert_outcomes(xfailed=2)
        run("test_own.py", *line[:-1], "one-key and test_a").assert_outcomes(xfailed=1)
        run("test_own.py::test_a", *line).assert_outcomes(xfailed=1)
        pytester.makefile(".txt", xfails="test_c[one-key-float32]\n")
        assert run("test_own.py", *line).ret == pytest.ExitCode.USAGE_ERROR

    def test_other_tests_are_unaffected(self, run, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(test_other="def test_other():\n    assert True\n")
        line = ["--lvx-xfails-file", "xfails.txt", "test_other.py"]
        pytester.makefile(".txt", xfails=f"{self.FAILING}*-float32\n")
        run(*line).assert_outcomes(passed=1)


OWN = """
import kernels
import numpy as np
import pytest

def test_mine(xattn_case):
    p = xattn_case
    out, lse = kernels.FUNCTION(p.q, p.k, p.v, scale=p.scale, mask=p.mask)
    dq, dk, dv = kernels.back(p.dout, p.q, p.k, p.v, out, lse, scale=p.scale, mask=p.mask)
    assert p.truth["out"].shape == out.shape
    assert not p.case.calls
    p.check(out=out, lse=lse, dq=dq)
    p.check(dk=dk, dv=dv)

def test_misuse(xattn_case):
    for results, error, words in (
        ({}, TypeError, "got nothing"),
        ({"o": 1}, TypeError, "got 'o'"),
        ({"out": None}, AssertionError, "out: expected an array of numpy, got NoneType"),
        ({"out": xattn_case.q[..., :1, :]}, AssertionError, "out: expected shape"),
        ({"dq": xattn_case.q.astype("f2")}, AssertionError, "dq: expected dtype float32, got "),
    ):
        with pytest.raises(error, match=words):
            xattn_case.check(**results)
"""


def test_own_test_gets_problem_and_judge(run, pytester: pytest.Pytester) -> None:
    calls = sum(bool(case.calls) for case in suite_of("quick"))
    pytester.makepyfile(test_own=OWN.replace("FUNCTION", "right"))
    run("test_own.py", *FLOAT32, "-k", "mine").assert_outcomes(passed=COUNT - calls)
    run("test_own.py", *FLOAT32, "-k", "misuse and gaussian").assert_outcomes(passed=1)


def test_own_test_failure_shows_the_report(run, pytester: pytest.Pytester) -> None:
    wrong = "right(p.q, p.k, p.v, scale=2 * p.scale, mask=p.mask) if True else kernels.right"
    pytester.makepyfile(test_own=OWN.replace("FUNCTION", wrong))
    done = run("test_own.py", *FLOAT32, "-k", "mine and gaussian")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "E*AssertionError: gaussian-float32: a plain problem*",
            "E*out: relative error*",
            "E*lse: relative error*",
        ]
    )
    assert "pytest_cases.py" not in str(done.stdout)


def test_own_test_gets_the_framework(run, pytester) -> None:
    pytester.makepyfile(
        test_torch="""
        import torch

        def test_mine(xattn_case):
            p = xattn_case
            mask = p.mask
            assert p.q.dtype == torch.bfloat16
            out = torch.nn.functional.scaled_dot_product_attention(
                p.q, p.k, p.v, attn_mask=mask, scale=p.scale, enable_gqa=True)
            p.check(out=out)
        """
    )
    line = ["test_torch.py", "--lvx-framework", "torch", "--lvx-dtypes", "bfloat16"]
    done = run(*line, "-k", "gaussian or one-kv or padding or minus")
    done.assert_outcomes(passed=4)


def in_a_new_process(*args: str, path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    found = os.pathsep.join([path, str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": found}
    return subprocess.run(
        [sys.executable, *args], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; import pytest; before = set(sys.modules); import lvxattn.pytest_plugin; "
        "print(*sorted(x.partition('.')[0] for x in set(sys.modules) - before))"
    )
    done = in_a_new_process("-c", program, path="", folder=tmp_path)
    assert set(done.stdout.split()) == {"lvxattn"}, done.stdout + done.stderr
    assert done.stdout.split() == ["lvxattn", "lvxattn"]  # and its plugin, not lvxattn.reference


def test_plugin_is_loaded_once(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["pytest11"].items()
    info = tmp_path / "installed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\n{} = {}\n".format(*entry))
    program = (
        "import pytest, sys; "
        "line = ['--pyargs', 'lvxattn.check.conformance', '-q']; "
        "line += ['--lvx-impl', 'kernels:right', '-k', 'gaussian and float32']; "
        "first = pytest.main([*line, '-W', 'error']); "
        "sys.exit(first or pytest.main([*line, '-p', 'lvxattn.pytest_plugin']))"
    )
    (tmp_path / "kernels.py").write_text(SOURCE)
    done = in_a_new_process("-c", program, path=str(tmp_path), folder=tmp_path)
    assert done.stdout.count("1 passed") == 2, done.stdout + done.stderr
    assert done.returncode == 0
