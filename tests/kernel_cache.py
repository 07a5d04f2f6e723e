"""Cached runs of the wrong kernels: every diagnosis runs all of them on the same problems."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from lvxattn.check import matching
from lvxattn.check.case_arrays import Problem
from lvxattn.check.matching import Array
from lvxattn.check.shards import Cut
from lvxattn.check.wrong import KernelBase, OnRanks

_results: dict[Any, dict[str, Array] | str] = {}


@pytest.fixture(autouse=True)
def cached_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "run_kernel", run_once)


def run_once(
    kernel: KernelBase | OnRanks,
    problem: Problem,
    names: Collection[str],
    cut: Cut | None = None,
) -> dict[str, Array] | str:
    """Replace `matching.run_kernel`, which always gets fresh kernels."""
    if (
        isinstance(kernel, OnRanks) or kernel.keeps_state or problem.case.S_KV > 128
    ):  # large results, seldom reused
        return _run(kernel, problem, names, cut)
    given = [getattr(problem, name) for name in ("q", "k", "v", "dout", "mask")]
    contents = [x.tobytes() for x in given if isinstance(x, np.ndarray)]
    gradients = bool({"dq", "dk", "dv"} & set(names))
    about = problem.case, problem.seed, problem.dtype, *contents
    key = type(kernel), *vars(kernel).items(), hash(about), gradients
    if key not in _results:
        _results[key] = _run(kernel, problem, names)
    return _results[key]


_run = matching.run_kernel
