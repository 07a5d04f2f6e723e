# %% [markdown]
# # 8. Your own kernel, and your own cluster
#
# The kernel below has one wrong line. It agrees with the reference to 1e-6 on 400 rows of random
# tensors, and returns zeros for a row whose scores are all low. On the cluster below, one schedule
# runs a layer 15 times as fast as another. This notebook finds both in seconds, before a model is
# trained with the wrong kernel, or for weeks on the wrong schedule.
#
# **You will be able to**
#
# - check your own attention kernel against the reference, find its bug, and write your own cases,
# - measure a machine, hold the plan against what it does, and choose a schedule for it,
# - launch ranks on a cluster, find the one that stopped, and read their trace.
#
# **Prerequisites.** [Notebook 2](02_why_queries_move.ipynb) for the schedules, [notebook
# 4](04_real_ranks_with_mpi.ipynb) for `%%mpi` and timelines.
#
# **Time.** About 40 minutes to read, of which the cells compute for one.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
import exercise
import numpy as np
from figures import own_kernel

from lvxattn.check import case_of, check
from lvxattn.check.wrong import WRONG, KernelBase
from lvxattn.reference import full_attention

# %% [markdown]
# ## A kernel with a bug
#
# This kernel follows FlashAttention-2 (arXiv:2307.08691): an online softmax over tiles of 64 keys,
# in which earlier sums are rescaled whenever a larger score occurs. `top` is the largest score so
# far, `total` the sum of $e^{s - \mathrm{top}}$ over the scores $s$ so far, `out` the same sum
# weighted with the values, and `lse` the natural log of the sum of $e^{s}$.
#
# `top` starts at 0, which avoids $e^{-\infty - (-\infty)}$, a NaN, where a mask hides a whole tile.


# %% tags=["subject"]
def attention(q, k, v, *, scale, mask):
    """Attend tile by tile; return out and lse."""
    if callable(mask):
        raise NotImplementedError("no masks that are functions")
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))  # grouped heads
    mask = np.broadcast_to(True if mask is None else mask, (*q.shape[:3], k.shape[2]))
    top = np.zeros((*q.shape[:3], 1), q.dtype)
    total, out = np.zeros_like(top), np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    for start in range(0, k.shape[2], 64):
        tile = np.s_[:, :, start : start + 64]
        s, seen = scale * (q @ k[tile].swapaxes(-1, -2)), mask[..., start : start + 64]
        s = np.where(seen, s, -np.inf) if seen.dtype == bool else s + seen
        higher = np.maximum(top, s.max(axis=-1, keepdims=True))
        p, fade = np.exp(s - higher), np.exp(top - higher)
        total = fade * total + p.sum(axis=-1, keepdims=True)
        out, top = fade * out + p @ v[tile], higher
    with np.errstate(divide="ignore"):  # log 0 is -inf: a row that sees no key
        lse = (top + np.log(total))[..., 0]
    return (out / np.where(total == 0, 1, total)).astype(q.dtype), lse


# %% [markdown]
# **Predict.** A common test uses random tensors, a mask that hides a third of the keys, and
# `allclose` with a tolerance of 1e-6. Does the kernel pass?
#
# <details><summary>Reasoning</summary>
#
# Yes. The largest score of a row of random vectors is nearly always above 0, so the initial value 0
# does no harm.
#
# </details>

# %%
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 4, s, 32)) for s in (50, 300, 300))
mask = rng.random((2, 4, 50, 300)) < 2 / 3
mask[:, :, 0] = False  # a row that sees no key
out, lse = attention(q, k, v, scale=32**-0.5, mask=mask)
truth_out, truth_lse = full_attention(q, k, v, scale=32**-0.5, mask=mask)
assert np.allclose(out, truth_out, rtol=0, atol=1e-6)
assert np.allclose(lse, truth_lse, rtol=0, atol=1e-6)
print(f"out and lse of {lse.size} rows agree with the reference to 1e-6")

# %% [markdown]
# Even the row that sees no key is correct. The oracle, `check`, runs the cases that break kernels,
# such as lengths that no tile divides, rows of large or low scores, all kinds of masks, GQA and
# unusual memory layouts. It allows the error that rounding in the dtype causes:
#
# $$\|\mathrm{result} - \mathrm{truth}\| \le 2E + u\,\|\mathrm{truth}\| + 4a\,\|\mathrm{size}\|$$
#
# $E$ is the error of the reference itself if it rounds to this dtype; $u$ and $a$ are the unit
# roundoffs of the dtype and of its accumulator; *size* is the result without cancellation (derived
# in [its README](../src/lvxattn/check/README.md)).
#
# **Predict.** In which cases is a maximum that starts at 0 wrong?
#
# <details><summary>Reasoning</summary>
#
# If all scores of a row are far below 0: then $e^{s - 0}$ underflows to 0, in fp32 below about
# -104, and the result is that of a row that sees no key.
#
# </details>

# %% tags=["varies"]
report = check(attention, dtypes=["float32"])
assert not report.passed
print(f"{len(report.failed)} of {len(report.rows)} cases fail")
for row in report.failed:
    print(f"- {row.case}: {row.reason}\n  {row.diagnosis}")
print(report.probably)

# %%
assert {row.case for row in report.failed} == {"lse-low", "finite-minimum", "hidden-rows"}
assert "maximum starts at 0" in report.probably
assert len(WRONG) > 48
print("three cases fail, the diagnosis names the line;", len(WRONG), "wrong kernels are known")

# %% [markdown]
# The last line is a diagnosis: the oracle compares the results with those of dozens of wrong
# kernels (`WRONG`), one of which has the same wrong values. `print(report)` prints the full report.
# The picture shows the error of each case relative to its limit:

# %%
rows = [row for row in report.rows if row.worst]
good, bad = ([row.worst.ratio for row in rows if (row.status == "wrong") == x] for x in (0, 1))
assert max(good) < 0.5
assert min(bad) > 100
print("errors are below half of the limit in all cases but three, and above 100 times it in those")

# %% tags=["varies"]
own_kernel.errors(rows)

# %% [markdown]
# All other cases are far below their limits: the kernel is correct except for one line, which the
# common test does not detect.
#
# <div class="alert alert-info">
#
# **Takeaway.** Random tensors have scores near 0, and test an attention kernel where it is hardest
# to get wrong. What breaks kernels are low and high scores, rows and tiles that see nothing, and
# lengths that no tile divides. Derive the tolerance from the dtype; a fixed one is too loose or too
# strict.
#
# </div>
#
# ### Exercise 1: fix the kernel
#
# Let `top` start at -inf, and make sure that a tile that is hidden completely does not give NaN.


# %% tags=["exercise"]
def mended(q, k, v, *, scale, mask):
    """Copy the kernel from above, and fix it."""
    return attention(q, k, v, scale=scale, mask=mask)


# %% tags=["check", "hide-input"]
def try_kernel(kernel):
    """Check a kernel with the oracle; then its memory and its values with many keys."""
    import tracemalloc

    from lvxattn.reference import full_attention as truth

    found = check(kernel, dtypes=["float32", "float64"], time_limit=5)
    wrong = [f"{row.case} ({row.dtype})" for row in found.failed]
    some = ", ".join(wrong[:6]) + (" and others" if len(wrong) > 6 else "")
    for row in found.failed[:1]:
        why = found.probably or f"the first: {row.message or row.worst.what}"
        raise AssertionError(f"{some} fail; {why}")

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, s, 4)) for s in (256, 8192, 8192))
    tracemalloc.start()
    try:
        out, lse = kernel(q, k, v, scale=0.5, mask=None)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    scores = 8 * 256 * 8192 / 1e6
    said = f"with 256 queries and 8,192 keys it takes {peak:.0f} MB; all scores are {scores:.0f} MB"
    assert peak < scores / 4, f"{said}: hold those of one tile at a time"
    right = truth(q, k, v, scale=0.5)
    for name, one, other in zip(("out", "lse"), (out, lse), right, strict=True):
        error = abs(one - other).max()
        assert error < 1e-9, f"with 8,192 keys {name} has an error of {error:.0e}"
    q[0, 0, 5] = np.nan
    lost = ~np.isnan(kernel(q, k, v, scale=0.5, mask=None)[0]).all(axis=3)[0, 0]
    assert not lost[5], "a query that is NaN has a result that is not: an error is hidden"
    assert lost.sum() == 255, "a query that is NaN makes other rows NaN"


with exercise.check(
    "the kernel passes all cases, one tile at a time", hide="full_attention KernelBase WRONG"
):
    try_kernel(mended)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# `base` is subtracted from the scores: it is 0 where no key has been seen yet, so that both
# exponents are -inf and not NaN.
#
# ```python
# def mended(q, k, v, *, scale, mask):
#     """Attend tile by tile; return out and lse."""
#     if callable(mask):
#         raise NotImplementedError("no masks that are functions")
#     k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
#     mask = np.broadcast_to(True if mask is None else mask, (*q.shape[:3], k.shape[2]))
#     top = np.full((*q.shape[:3], 1), -np.inf, q.dtype)
#     total, out = np.zeros_like(top), np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
#     for start in range(0, k.shape[2], 64):
#         tile = np.s_[:, :, start : start + 64]
#         s, seen = scale * (q @ k[tile].swapaxes(-1, -2)), mask[..., start : start + 64]
#         s = np.where(seen, s, -np.inf) if seen.dtype == bool else s + seen
#         higher = np.maximum(top, s.max(axis=-1, keepdims=True))
#         base = np.where(higher == -np.inf, 0, higher)
#         p, fade = np.exp(s - base), np.exp(top - base)
#         total = fade * total + p.sum(axis=-1, keepdims=True)
#         out, top = fade * out + p @ v[tile], higher
#     with np.errstate(divide="ignore"):
#         lse = (top + np.log(total))[..., 0]
#     return (out / np.where(total == 0, 1, total)).astype(q.dtype), lse
# ```
#
# </details>

# %% [markdown]
# ## Your own cases
#
# The oracle detects only the defects that its cases exercise. This kernel, one of `WRONG`, drops
# all keys beyond 4,096:

# %%
capacity = WRONG["keys beyond 4,096 dropped"]()
assert check(capacity, dtypes=["float32"]).passed
print("the quick suite says nothing")

# %% [markdown]
# It passes the quick suite, which has no case of that length. (`suite="full"` has one.) A case is a
# frozen dataclass: its sizes, the distribution of its data, its mask. `check(fn, cases=[...])` runs
# these cases instead of a suite.

# %%
from dataclasses import asdict, replace

gaussian = case_of("gaussian")
print({name: x for name, x in asdict(gaussian).items() if name in ("H", "S_Q", "S_KV", "D")})

# %% [markdown]
# ### Exercise 2: a case that this kernel fails
#
# `replace` (from `dataclasses`) copies a case with some fields changed. Give it a `name`, too.

# %% tags=["exercise"]
mine = replace(gaussian, name="mine")


# %% tags=["check", "hide-input"]
def try_case(case):
    """Run a case on a correct kernel, and on the one that drops keys."""
    kind = type(case_of("gaussian"))
    assert isinstance(case, kind), f"mine is of type {type(case).__name__}, expected a case"
    most = 200_000
    assert most >= case.S_KV, f"{case.S_KV:,} keys take too long; fewer than {most:,} are enough"
    correct = check(KernelBase(), dtypes=["float32"], cases=[case], time_limit=10)
    assert correct.passed, f"a correct kernel fails it, too: {correct.probably or correct}"
    found = check(WRONG["keys beyond 4,096 dropped"](), dtypes=["float32"], cases=[case])
    assert found.failed, f"with {case.S_KV:,} keys and {case.S_Q:,} queries the kernel passes"


with exercise.check("your case detects the bug, and a correct kernel passes it", hide="capacity"):
    try_case(mine)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# More than 4,096 keys, by any number: in fp32 a single missing key is detected.
#
# ```python
# mine = replace(gaussian, name="mine", S_KV=5000)
# ```
#
# </details>

# %% [markdown]
# Add cases with the sizes of your own model. With `framework="torch"` the kernel gets PyTorch
# tensors, and its gradients are checked, too; `suite="full"` runs in all dtypes.
#
# ## Measure a machine
#
# The best schedule depends on the machine, which is described by a few numbers. `measure`
# determines them in a few seconds; `%%mpi 4` starts four ranks for it.
#
# | field | meaning |
# |---|---|
# | `matmul` | floating-point operations per second in attention with many queries |
# | `memory` | bytes per second at which keys and values are read, with one query |
# | `start`, `call` | overhead of a block and of a pass, in seconds |
# | `inside`, `between` | links inside and between hosts: bytes per second, seconds per message |
# | `copy`, `room`, `hiding` | copy rate, bytes of memory, overlap of arithmetic and reading |
# | `measured` | the conditions: device, implementation, heads and dtype |

# %%
# %%mpi 4 --timeout 120 --give machine
from mpi4py import MPI

from lvxattn.mpi_impl import measure

machine = measure(MPI.COMM_WORLD, H=8, H_KV=8, D=64)

# %%
import tempfile
from pathlib import Path

from lvxattn.plan import Machine

assert machine.ranks == 4
assert min(machine.matmul, machine.memory, machine.start, machine.inside.bandwidth) > 0
with tempfile.TemporaryDirectory() as folder:
    machine.save(Path(folder) / "machine.json")  # plans and programs can load this file
    assert Machine.load(Path(folder) / "machine.json") == machine
print("measured on four ranks, saved, and loaded again")

# %% tags=["varies"]
print(f"attention {machine.matmul / 1e9:6.1f} GFLOP/s per rank")
print(f"memory    {machine.memory / 1e9:6.1f} GB/s per rank")
print(f"link      {machine.inside.bandwidth / 1e9:6.1f} GB/s")
print(f"message   {1e6 * machine.inside.latency:6.0f} µs, of no size")

# %% [markdown]
# Every rank calls `Layout.agree` once before attention: it compares shapes and determines the
# schedule. `schedule="auto"` selects the schedule that sends the fewest bytes or, if a machine is
# given, the one that takes the least time on it.
#
# **Predict.** Four queries, one on each of four ranks, and 65,536 keys; 8 heads of 64, fp32. Which
# schedule sends the fewest bytes, `lv-xattn`, `ring`, `grid`, `ulysses` or `gather`?
#
# <details><summary>Reasoning</summary>
#
# There are few queries, so one that moves queries and results: lv-xattn moves them round a ring,
# gather all at once, and both send the same bytes. The others move keys and values, but for the
# grid of one column, which is lv-xattn.
#
# </details>

# %%
# %%mpi 4 --take machine --give explained,bytes_only,timed
import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import Layout
from lvxattn.plan import explain

comm = MPI.COMM_WORLD
q, k = np.zeros((1, 8, 1, 64), np.float32), np.zeros((1, 8, 16384, 64), np.float32)
bytes_only = Layout.agree(q, k, k, comm, schedule="auto").schedule
layout = Layout.agree(q, k, k, comm, schedule="auto", machine=machine)
timed, explained = layout.schedule, explain(layout)

# %% tags=["varies"]
print(explained)
assert bytes_only in ("lv-xattn", "gather")
assert timed in ("lv-xattn", "gather")

# %% [markdown]
# The bytes are those of the rank that sends most, forward and backward. The seconds follow from
# them and from the machine. With and without a machine, `auto` selects a schedule that moves the
# queries.
#
# ## Hold the plan against this machine
#
# The plan's seconds come from a few rates and a simulation of every message and block. How good are
# they? Every schedule runs forward and backward at three sizes.
#
# **Predict.** 16 queries and 16,384 keys; 1,024 queries and 1,024 keys; 8,192 queries and 64 keys.
# In which of them does the choice of a schedule matter least? Which schedule is slowest in the
# first, and which two move the most in the third?
#
# <details><summary>Reasoning</summary>
#
# In the second: the ranks compute four times as many scores as in the first, and move about as much
# with any schedule. In the first, Ring Attention is slowest, which moves 16,384 keys and values on
# account of 16 queries. In the third, the queries are the long side: LV-XAttn and gather move them
# all.
#
# </details>

# %%
sizes = [(16, 16384), (1024, 1024), (8192, 64)]  # queries and keys of all ranks together

# %% tags=["subject"]
# %%mpi 4 --timeout 280 --take machine,sizes --give measured,predicted
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import Layout, cross_attention, cross_attention_backward, shard
from lvxattn.plan import candidates

comm, rng = MPI.COMM_WORLD, np.random.default_rng(0)
measured, predicted = {}, {}
for S_Q, S_KV in sizes:
    whole = (rng.standard_normal((1, 8, s, 64), dtype=np.float32) for s in (S_Q, S_KV, S_KV))
    q, k, v = (shard(x, comm) for x in whole)
    took = {}
    for schedule in ("lv-xattn", "ring", "grid", "ulysses", "gather"):
        layout = Layout.agree(q, k, v, comm, schedule=schedule, machine=machine)
        turns = []
        for _ in range(6):
            comm.Barrier()
            start = perf_counter()
            out, lse = cross_attention(q, k, v, comm, layout=layout)
            cross_attention_backward(out, q, k, v, out, lse, comm, layout=layout)
            turns.append(max(comm.allgather(perf_counter() - start)))  # the slowest rank
        took[schedule] = median(turns[1:])  # the first is a warm-up
    measured[S_Q, S_KV] = took
    predicted[S_Q, S_KV] = {c.schedule: c.seconds for c in candidates(layout, machine)}

# %% tags=["varies"]
print(f"{'queries':>8}{'keys':>8}  {'schedule':9}{'measured':>12}{'planned':>12}")
for (S_Q, S_KV), took in measured.items():
    for schedule, seconds in took.items():
        planned_ms = 1e3 * predicted[S_Q, S_KV][schedule]
        print(f"{S_Q:8,}{S_KV:8,}  {schedule:9}{1e3 * seconds:9.1f} ms{planned_ms:9.1f} ms")
first = measured[16, 16384]
assert min(first["lv-xattn"], first["gather"]) < first["ring"]

# %% tags=["varies"]
own_kernel.beside_the_plan(measured, predicted)

# %% [markdown]
# What a plan has to get right is the order. The next cell counts the pairs of schedules whose
# planned times are a factor of 1.5 or more apart, and how many of them are measured in that order.
# It also prints what is lost by taking the plan's choice:

# %% tags=["varies"]
from itertools import permutations

far = same = 0
for size, took in measured.items():
    plan = predicted[size]
    for fast, slow in permutations(took, 2):
        apart = plan[slow] >= 1.5 * plan[fast]
        far, same = far + apart, same + (apart and took[slow] > took[fast])
    choice, best = (min(times, key=times.get) for times in (plan, took))
    lost = took[choice] / took[best] - 1
    print(f"{size[0]:6,} queries: the plan takes {choice}, the clock {best}; lost {lost:.0%}")
print(f"pairs that are planned a factor of 1.5 apart: {far}; measured in that order: {same}")

# %% [markdown]
# Where ranks mostly compute, as in the second problem, the times of the schedules are close, and a
# wrong choice costs little. Times in shared memory are the hardest to plan: the cores that should
# compute copy the messages, into memory whose first access is slow, and a notebook shares them with
# other work. Over 112 problems, on networks and in shared memory, planned times are within a
# factor of 1.04 of measured ones in the median, and what the plan chose was at most 14 % slower
# than the fastest ([every cell](../benchmarks/results/schedules.md)). So trust the plan's order
# where it sees a large difference, and measure where it sees a small one.
#
# <div class="alert alert-info">
#
# **Takeaway.** Call `measure`, then use `schedule="auto"` with the machine, and `explain(layout)`
# to see why. A plan is for choosing between schedules that are far apart; it is not a stopwatch.
#
# </div>
#
# ## Plan for another cluster
#
# Some clusters are built in: `a100-16` is one of the paper's, 16 A100 on 4 hosts
# (arXiv:2502.02406). The plan computes the cost of a layer of a model there.
#
# **Predict.** For Llama 3-V with 1,200 frames of 6,404 visual tokens and 2,048 text tokens, how
# many times as fast as Ring Attention is LV-XAttn, roughly: 1, 4, 16 or 64?
#
# <details><summary>Reasoning</summary>
#
# Ring Attention is communication-bound here, LV-XAttn compute-bound: the speed-up is the ratio of
# these two times, not that of the bytes (600 to 1). It is about 16.
#
# </details>

# %%
import subprocess
import sys

arguments = "--model llama3v --frames 1200 --text-tokens 2048 --machine a100-16"
plan = [sys.executable, "-m", "lvxattn.plan", *arguments.split()]
told = subprocess.run(plan, capture_output=True, text=True, check=True).stdout
print(told.rstrip())
assert "15.4 x" in told
assert "least time  lv-xattn" in told

# %% [markdown]
# A layer is 15 times as fast, a step of the whole model only twice: most of the time that is left
# is the vision tower's, which runs on each rank by itself.
#
# In a program, `planned` makes the layout of a hypothetical problem, and `candidates` simulates
# every schedule on a machine, and returns them with the fastest first:


# %%
from lvxattn.plan import MACHINES, MODELS, candidates, planned


def times(text_tokens, frames, machine):
    """Return seconds of a layer of Llama 3-V, forward and backward, by schedule; fastest first."""
    q, k = MODELS["llama3v"].shapes(text_tokens, frames)
    found = candidates(planned(q, k, machine.ranks), machine)
    return {c.schedule: c.seconds for c in found if not c.refused}


# %%
a100 = MACHINES["a100-16"]
tokens = [2**n for n in range(4, 16)]
played = [times(n, 8, a100) for n in tokens]
fastest = {tokens[n]: next(iter(played[n])) for n in (0, 6, 11)}
assert list(fastest.values()) == ["gather", "lv-xattn", "ring"]
print("fastest by text tokens:", fastest)

# %%
own_kernel.gains(tokens, played, "Llama 3-V, 8 frames, a100-16 (simulated, not measured)")

# %% [markdown]
# For few queries `gather` is fastest: it has one latency and reads the keys once, where a ring does
# both at every hop ([notebook 2](02_why_queries_move.ipynb)). For more queries it is `lv-xattn`,
# whose hops are hidden behind computing. If the queries have as many bytes as a short video's keys,
# it is a `grid`, which moves some of both, and then `ring`. (`ulysses` is not available: 16 ranks
# do not divide 8 key-value heads.)
#
# ### Exercise 3: when Ring Attention is fastest
#
# Write a function that returns the smallest power of two of text tokens, from 16 up, for which Ring
# Attention is the fastest schedule on a video of `frames` frames.


# %% tags=["exercise"]
def first_ring(frames, machine):
    """Return the fewest text tokens, a power of two, for which ring is fastest."""
    raise NotImplementedError("first_ring is not implemented")


# %% tags=["check", "hide-input"]
import signal
from contextlib import contextmanager


@contextmanager
def limit(seconds, said):
    """Raise TimeoutError in what takes longer."""

    def late(*_):
        raise TimeoutError(f"{said} takes more than {seconds} s: does its loop end?")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_first_ring(frames, machine):
    """Compare the number of tokens with its neighbours."""
    call = f"first_ring({frames}, {machine.name} of {machine.ranks} ranks)"
    with limit(30, call):
        found = first_ring(frames, machine)
    whole = isinstance(found, int) and found >= 16 and found & (found - 1) == 0
    assert whole, f"{call} is {found}, expected a power of two from 16 up"
    for n, ring in ((found, True), (found // 2, False)):
        best = next(iter(times(n, frames, machine)))
        said = f"{call} is {found:,}, but with {n:,} tokens {best} is the fastest"
        assert (best == "ring") == ring, said


with exercise.check("it is right for other videos and machines, too", hide="a100 tokens played"):
    for frames, cluster in ((2, "a100-16"), (8, "a100-16"), (3, "a30-8"), (16, "a100-16")):
        try_first_ring(frames, MACHINES[cluster])
    try_first_ring(5, replace(MACHINES["a100-16"], ranks=8))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def first_ring(frames, machine):
#     """Return the fewest text tokens, a power of two, for which ring is fastest."""
#     text_tokens = 16
#     while next(iter(times(text_tokens, frames, machine))) != "ring":
#         text_tokens *= 2
#     return text_tokens
# ```
#
# </details>

# %% [markdown]
# ## Launch on a cluster
#
# A Slurm job for two hosts, with two ranks on each
# ([gpu.sbatch](../examples/cluster/gpu.sbatch) is one for GPUs):

# %%
script = Path("../examples/cluster/mpi.sbatch").resolve()
print(script.read_text())
assert "srun --mpi=pmi2" in script.read_text()

# %% [markdown]
# `benchmarks/netlab` plays two hosts on one machine, with a network, processes and a Slurm of their
# own, if Slurm is installed here (`sh benchmarks/netlab/install.sh`) and the kernel is root's:

# %%
sys.path.insert(0, str(Path("..").resolve()))  # netlab is not part of the package
from benchmarks.netlab.lab import Lab, LabError
from benchmarks.netlab.slurm import Slurm


def submit(script):
    """Submit a script, wait until the job has ended, and return what it has printed."""
    with tempfile.TemporaryDirectory() as shared, Lab(2, "1gbit", shared=[shared]) as lab:
        Path(shared, ".venv").symlink_to(sys.prefix)  # which the script activates
        with Slurm(lab) as slurm:
            where = f"--chdir={shared}", f"--output={shared}/printed"
            slurm.wait(slurm.run(["sbatch", "--parsable", *where, script]).stdout.strip())
            return Path(shared, "printed").read_text()


# %% tags=["varies"]
try:
    if not Path(sys.prefix, "bin", "activate").exists():
        raise LabError("this Python is not that of a virtual environment")
    printed = submit(script)
except LabError as reason:
    print(f"no Slurm ({reason}): this is what docs/first-job.md shows\n")
    page = Path("../docs/first-job.md").read_text()
    printed = page.split("cat slurm-1.out\n")[1].split("```")[0]
doctor, checked = printed.split("  messages")[0], printed.split("slowest rank\n")[-1]
print(doctor, checked, sep="  ...\n")

# %%
assert "4 on 2 hosts" in doctor
assert checked.count(" ok\n") == 5
assert "all checks passed" in checked
print("four ranks on two hosts; out, lse, dq, dk and dv are those of one softmax")

# %% [markdown]
# With `-m mpi4py` an error on one rank ends all ranks. `LVXATTN_TIMEOUT` ends a run in which a rank
# waits longer than that, in seconds. `run --check` compares sampled rows with a softmax in float64.
# With CuPy, `q`, `k` and `v` are on the GPU (`--device gpu` makes a missing GPU an error). A
# *CUDA-aware* MPI sends device memory directly; for any other, blocks are copied through host
# memory.
#
# Before a job, `doctor` reports whether the ranks can communicate, how many there are on each host,
# whether they compete for cores or share a GPU, and whether MPI is CUDA-aware.
#
# **Predict.** Two processes are started without a launcher, or with the launcher of another MPI.
# What is `comm.size`?
#
# <details><summary>Reasoning</summary>
#
# 1 in every process, because they have no information about one another. Each process runs the
# whole job alone, without an error. (The commands of `lvxattn` compare `comm.size` with the
# launcher's environment variables, and refuse to start; your own program does not.)
#
# </details>

# %% tags=["varies"]
from lvxattn.mpi_impl.jupyter.launch import find_mpiexec

labels = ("launcher", "ranks", "CUDA-aware")  # labels of the lines shown here
command = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl", "doctor"]
for launcher in ([*find_mpiexec(), "-n", "2"], []):  # with mpiexec, and without
    doctor = [*launcher, sys.executable, *command]
    told = subprocess.run(doctor, capture_output=True, text=True, check=True).stdout
    lines = [line for line in told.splitlines() if line[2:12].strip() in labels]
    print("\n".join(lines), "\n")
    assert f"ranks       {2 if launcher else 1} on 1 host" in told

# %% [markdown]
# ### A rank that stops
#
# If a rank stops, the others wait for its blocks, and with `LVXATTN_TIMEOUT` each prints which
# block it waits for, at which hop.
#
# **Predict.** In a ring of three ranks, $0 \to 1 \to 2 \to 0$, rank 2 sleeps instead of attending.
# Which blocks do ranks 0 and 1 wait for, and how does that show which rank has stopped?
#
# <details><summary>Reasoning</summary>
#
# Rank 0 waits for the queries of rank 2. Rank 1 gets those of rank 0 and then waits for those of
# rank 2, too, which rank 0 cannot forward. The rank that prints nothing, rank 2, has stopped.
#
# </details>

# %%
program = """
import time
import numpy as np
from mpi4py import MPI
from lvxattn.mpi_impl import Layout, cross_attention

comm, x = MPI.COMM_WORLD, np.ones((1, 1, 8, 4))
layout = Layout.agree(x, x, x, comm)
if comm.rank == 2:
    time.sleep(60)
cross_attention(x, x, x, comm, layout=layout)
"""

# %%
import os

ranks = [*find_mpiexec(), "-n", "3", sys.executable, "-m", "mpi4py", "-c", program]
environment = {**os.environ, "LVXATTN_TIMEOUT": "2"}
ended = subprocess.run(ranks, capture_output=True, text=True, check=False, env=environment)
said = [line.split(";")[0] for line in ended.stderr.splitlines() if "has waited" in line]
print("\n".join(sorted(said)))
assert ended.returncode == 124
assert [line[:6] for line in sorted(said)] == ["rank 0", "rank 1"]

# %% [markdown]
# ## Read a trace
#
# `run --plot-trace FILE.png` draws the timeline of every rank, as in [notebook
# 4](04_real_ranks_with_mpi.ipynb). `--trace FILE` writes it in a format that
# [ui.perfetto.dev](https://ui.perfetto.dev) opens: one process per rank, with tracks for computing,
# sending and waiting. It is JSON, a list of events. `"ph": "X"` is a slice of a track, with its
# start `ts` and duration `dur` in microseconds; `pid` is the rank and `tid` the track. `"s"` starts
# an arrow, which follows a block, and `"i"` is an instant: the start of a pass.
#
# **Predict.** For LV-XAttn on four ranks, forward and backward, how many slices of sending are
# there, and how many of computing? (A rank computes with its own block in two parts, at the start
# and at the end.)
#
# <details><summary>Reasoning</summary>
#
# Sending: 2 passes, 4 ranks, 3 hops of queries and 3 of results: 48. Computing: 2 passes, 4 ranks,
# 3 visiting blocks and 2 parts of its own: 40.
#
# </details>

# %%
import json

options = "--text-tokens 512 --visual-tokens 4096 --backward --repeat 2 --quiet"
ranks = [*find_mpiexec(), "-n", "4", sys.executable, "-m", "mpi4py", "-m", "lvxattn.mpi_impl"]
with tempfile.TemporaryDirectory() as folder:
    files = [str(Path(folder) / name) for name in ("trace.json", "trace.png")]
    written = ["--trace", files[0], "--plot-trace", files[1]]
    subprocess.run([*ranks, "run", *options.split(), *written], check=True)
    events = json.loads(Path(files[0]).read_text())["traceEvents"]
    picture = Path(files[1]).read_bytes()

# %%
from collections import Counter

slices = [event for event in events if event["ph"] == "X"]
count = Counter(event["name"].split()[0] for event in slices)
tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
print(sorted(set(tracks.values())), "sent:", count["send"], "computed:", count["compute"])
assert (count["send"], count["compute"]) == (48, 40)
assert {event["pid"] for event in slices} == {0, 1, 2, 3}
assert sum(event["ph"] == "s" for event in events) == 2 * 4 * 2  # a pass: 4 queries, 4 results

# %% tags=["varies"]
from IPython.display import Image

Image(picture, alt="Timelines of four ranks, with an arrow for every block")

# %% [markdown]
# Three patterns to look for in a trace: orange means that a rank only waits, and the arrow that
# ends there shows for whose block. If the others always wait for the same rank, it has more keys,
# fewer cores or a slower link. Gaps between the blue without orange below are neither computing nor
# waiting, but merging, copying or Python.
#
# <div class="alert alert-info">
#
# **Takeaways.** A kernel whose maximum starts at 0 passes a test with random tensors. The oracle
# has three cases that it fails, and names the bug. Add cases of your own model's sizes.
#
# - A machine is described by a dozen numbers, measured in seconds or taken from a preset. They
#   determine the fastest schedule: gather for few queries, LV-XAttn for more, Ring Attention for a
#   long text and a short video.
# - Before a run use `doctor`; during it `LVXATTN_TIMEOUT` reveals a rank that stopped; after it the
#   trace shows which rank waited for which block.
#
# </div>
#
# Files: [src/lvxattn/check](../src/lvxattn/check/README.md),
# [src/lvxattn/plan/choose.py](../src/lvxattn/plan/choose.py),
# [src/lvxattn/plan/measure.py](../src/lvxattn/plan/measure.py),
# [src/lvxattn/plan/trace_file.py](../src/lvxattn/plan/trace_file.py),
# [mpi_impl/transport/watchdog.py](../mpi_impl/transport/watchdog.py). All options are in
# [docs/commands.md](../docs/commands.md), all variables in
# [docs/clusters.md](../docs/clusters.md).
#
# This is the last notebook; [notebook 1](01_merging_softmax.ipynb) is about the merge, the basis of
# all of them.
