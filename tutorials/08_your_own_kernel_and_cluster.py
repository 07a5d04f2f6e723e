# %% [markdown]
# # 8. Your own kernel, and your own cluster
#
# At the end you can hold an attention kernel of yours against the reference and find its bug, and
# take the step from a laptop to a cluster: choose a schedule, start the ranks, read what they did.
#
# It needs [notebook 2](02_why_queries_move.ipynb), for the schedules,
# [notebook 4](04_real_ranks_with_mpi.ipynb), for `%%mpi` and timelines, and about 30 minutes.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import exercise
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from lvxattn.check import case_of, check
from lvxattn.check.wrong import WRONG, KernelBase
from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.mpi_impl.jupyter.launch import find_mpiexec
from lvxattn.plan import MACHINES, MODELS, Machine, candidates, planned
from lvxattn.reference import full_attention

# %% [markdown]
# ## A kernel with a bug
#
# Here is a kernel as one writes it after reading FlashAttention-2 (arXiv:2307.08691): keys come in
# tiles of 64, and what was summed before is scaled down whenever a larger score comes. `top` is the
# largest score so far, `total` the sum of $e^{s - \mathrm{top}}$ over the scores $s$ so far, `out`
# the same sum weighted with the values, and `lse` the natural log of the sum of $e^{s}$.
#
# `top` starts at 0. So nobody has to think about $e^{-\infty - (-\infty)}$, which is NaN, where a
# mask hides a whole tile.


# %%
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
    with np.errstate(divide="ignore"):  # log 0 is -inf: a row that sees nothing
        lse = (top + np.log(total))[..., 0]
    return (out / np.where(total == 0, 1, total)).astype(q.dtype), lse


# %% [markdown]
# **Predict.** The usual test: random tensors, a mask that hides a third of the keys, `allclose`
# with a tolerance of a millionth. Does it pass?
#
# <details><summary>Reasoning</summary>
#
# It does. Scores of random vectors are a few units, so that the largest of a row is nearly always
# above 0 and a start at 0 does no harm.
#
# </details>

# %%
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 4, s, 32)) for s in (50, 300, 300))
mask = rng.random((2, 4, 50, 300)) < 2 / 3
mask[:, :, 0] = False  # a row that sees nothing
out, lse = attention(q, k, v, scale=32**-0.5, mask=mask)
truth_out, truth_lse = full_attention(q, k, v, scale=32**-0.5, mask=mask)
assert np.allclose(out, truth_out, rtol=0, atol=1e-6)
assert np.allclose(lse, truth_lse, rtol=0, atol=1e-6)

# %% [markdown]
# Even its row that sees nothing is right. Now the oracle: `check` has the cases that break kernels,
# such as lengths that no tile divides, rows of large or low scores, all kinds of masks, grouped
# heads and odd memory layouts. It allows a result the error that the roundings of its dtype make:
#
# $$\|\mathrm{result} - \mathrm{truth}\| \le 2E + u\,\|\mathrm{truth}\| + 4a\,\|\mathrm{size}\|$$
#
# $E$ is the error of the reference itself when it rounds as this dtype must; $u$ and $a$ are the
# roundoffs of the dtype and of its sums; *size* is what the result would be if nothing cancelled
# ([its page](../src/lvxattn/check/README.md) derives this).
#
# **Predict.** In which kind of case does a maximum that starts at 0 do harm?
#
# <details><summary>Reasoning</summary>
#
# Where all scores of a row are far below 0: then $e^{s - 0}$ underflows to 0, in fp32 below
# about -104, and the row looks as if it saw nothing.
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

# %% [markdown]
# The last line is a diagnosis. The oracle knows dozens of wrong kernels (`WRONG`), and compares:
# one of them comes to the same wrong numbers. `print(report)` shows all there is. This is the error
# of each case as a part of its limit:

# %%
rows = [row for row in report.rows if row.worst]
wrong = [row.status == "wrong" for row in rows]
assert all(row.worst.ratio < 0.5 for row, bad in zip(rows, wrong, strict=True) if not bad)
assert all(row.worst.ratio > 100 for row, bad in zip(rows, wrong, strict=True) if bad)

# %% tags=["hide-input", "varies"]
ratios = [min(max(row.worst.ratio, 3e-3), 300) for row in rows]
figure, axes = plt.subplots(figsize=(8, 6), dpi=90, layout="constrained")
axes.axvline(1, color=INK, lw=1)
axes.text(1.1, -0.8, "the limit", color=INK, va="bottom")
axes.scatter(ratios, range(len(rows)), c=[COLOURS[5 if bad else 0] for bad in wrong], s=28)
for n, bad in enumerate(wrong):
    if bad:
        text = "out of all bounds "
        axes.text(250, n, text, color=COLOURS[5], ha="right", va="center", weight="bold")
axes.set_yticks(range(len(rows)), [row.case for row in rows], size=8)
axes.set(
    xscale="log",
    xlim=(2e-3, 500),
    ylim=(len(rows), -1),
    xlabel="error / limit (at the left edge: no error at all)",
)
axes.grid(axis="y", color="#EEEEEE")
axes.set_axisbelow(True)
axes.spines[["top", "right", "left"]].set_visible(False)
plt.show()

# %% [markdown]
# Everything else is far below its limit: a good kernel with one wrong line, which the usual test
# does not find.
#
# ### Exercise 1: mend it
#
# Let `top` start at -inf, and see to it that a tile that is hidden as a whole makes no NaN.


# %% tags=["exercise"]
def mended(q, k, v, *, scale, mask):
    """Copy the kernel from above to here, and change what has to be changed."""
    return attention(q, k, v, scale=scale, mask=mask)


# %% tags=["check"]
with exercise.check("the oracle finds nothing"):
    found = check(mended, dtypes=["float32", "float64"])
    wrong = [f"{row.case} ({row.dtype})" for row in found.failed]
    assert not wrong, f"{', '.join(wrong)} fail; {found.probably or 'print(found) says more'}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# `base` is what is subtracted: 0 where nothing has been seen yet, so that both exponents are -inf
# and not NaN.
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
# ## A case of your own
#
# The oracle finds what its cases bring out, and no more. This kernel, from the library of wrong
# ones, has room for 4,096 keys and leaves out the rest:

# %%
capacity = WRONG["keys beyond 4,096 dropped"]()
assert check(capacity, dtypes=["float32"]).passed

# %% [markdown]
# It passes the quick suite, which has no case so long. (`suite="full"` has.) A case is a small
# frozen object: its sizes, how its data are drawn, its mask. `check(fn, cases=[...])` takes cases
# instead of a suite.

# %%
gaussian = case_of("gaussian")
print({name: x for name, x in asdict(gaussian).items() if name in ("H", "S_Q", "S_KV", "D")})

# %% [markdown]
# ### Exercise 2: a case that this kernel fails
#
# `replace` (from `dataclasses`) copies a case with some fields changed. Give it a `name`, too.

# %% tags=["exercise"]
mine = replace(gaussian, name="mine")

# %% tags=["check"]
with exercise.check("your case finds the bug, and does not accuse a right kernel"):
    correct = check(KernelBase(), dtypes=["float32"], cases=[mine])
    assert correct.passed, "a correct kernel fails it, too"
    found = check(capacity, dtypes=["float32"], cases=[mine])
    assert found.failed, f"with {mine.S_KV:,} keys the kernel passes"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# More than 4,096 keys. How many more hardly matters: a lost key shows in fp32.
#
# ```python
# mine = replace(gaussian, name="mine", S_KV=5000)
# ```
#
# </details>

# %% [markdown]
# Whatever sizes you train with, make a case of them. With `framework="torch"` the kernel gets
# PyTorch tensors, and its gradients are checked, too; with `suite="full"` in all dtypes.
#
# ## How fast is this machine?
#
# Which schedule is best depends on the machine, and a machine is described by a few numbers. Some
# seconds of probes find them; `%%mpi 4` starts four ranks for that.
#
# | field | what it is |
# |---|---|
# | `matmul` | floating-point operations a second in attention with many queries |
# | `memory` | bytes a second at which keys and values are read, with one query |
# | `start`, `call` | seconds that a block, and a pass, take however small they are |
# | `inside`, `between` | links inside a host and between hosts: bytes a second, seconds a message |
# | `copy`, `room`, `hiding` | rate of copying, bytes of memory, how far arithmetic hides reading |
# | `measured` | what was measured: device, implementation, heads and dtype |

# %%
# %%mpi 4 --timeout 120 --give machine
from mpi4py import MPI

from lvxattn.mpi_impl import measure

machine = measure(MPI.COMM_WORLD, H=8, H_KV=8, D=64)

# %%
assert machine.ranks == 4
assert min(machine.matmul, machine.memory, machine.start, machine.inside.bandwidth) > 0
with tempfile.TemporaryDirectory() as folder:
    machine.save(Path(folder) / "machine.json")  # keep it: plans and programs can load it
    assert Machine.load(Path(folder) / "machine.json") == machine

# %% [markdown]
# `Layout.agree` is what every rank calls once before it attends: shapes are compared, and the
# schedule is settled. `schedule="auto"` takes the schedule that sends the fewest bytes or, with a
# machine, the one that takes the least time on it.
#
# **Predict.** Four queries, one on each of four ranks, and 65,536 keys; 8 heads of 64, fp32. Which
# schedule sends the fewest bytes, `lv-xattn`, `ring`, `ulysses` or `gather`?
#
# <details><summary>Reasoning</summary>
#
# Queries are few, so one that moves queries and results: lv-xattn moves them round a ring, gather
# all at once, and both send the same bytes. The other two move keys and values.
#
# </details>

# %%
# %%mpi 4 --take machine --give explained,bytes_only,timed
import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import Layout

comm = MPI.COMM_WORLD
q, k = np.zeros((1, 8, 1, 64), np.float32), np.zeros((1, 8, 16384, 64), np.float32)
layout = Layout.agree(q, k, k, comm, schedule="auto")
bytes_only, explained = layout.schedule, layout.explain()
timed = Layout.agree(q, k, k, comm, schedule="auto", machine=machine).schedule

# %%
print(explained)
assert bytes_only in ("lv-xattn", "gather")
assert timed in ("lv-xattn", "gather")

# %% [markdown]
# The bytes are those of the rank that sends most, forward and backward. Both ways of asking lead to
# a schedule that moves the queries. `layout.explain()` of the other layout has seconds, too.
#
# ## A cluster that you do not have yet
#
# Some clusters are built in: `a100-16` is one of the paper's, 16 A100 on 4 hosts
# (arXiv:2502.02406). The plan says what a layer of a model would cost there.
#
# **Predict.** Llama 3-V, 1,200 frames, 2,048 text tokens. A frame is 6,404 visual tokens. How many
# times as fast as Ring Attention is LV-XAttn, roughly: 1, 4, 16 or 64?
#
# <details><summary>Reasoning</summary>
#
# Ring Attention is bound by its bytes here, LV-XAttn by arithmetic: the ratio of the two times, not
# of the bytes (600 to 1), is what is gained. It is about 16.
#
# </details>

# %%
arguments = "--model llama3v --frames 1200 --text-tokens 2048 --machine a100-16"
plan = [sys.executable, "-m", "lvxattn.plan", *arguments.split()]
told = subprocess.run(plan, capture_output=True, text=True, check=True).stdout
print(told.rstrip())
assert "15.4 x" in told
assert "least time  lv-xattn" in told

# %% [markdown]
# In a program, `planned` makes the layout of a problem that nobody has yet, and `candidates` plays
# every schedule on a machine's clocks, best first:


# %%
def times(text_tokens, frames, machine):
    """Return seconds of a layer of Llama 3-V, forward and backward, by schedule; best first."""
    q, k = MODELS["llama3v"].shapes(text_tokens, frames)
    found = candidates(planned(q, k, machine.ranks), machine)
    return {c.schedule: c.seconds for c in found if not c.refused}


# %%
a100 = MACHINES["a100-16"]
tokens = [2**n for n in range(4, 16)]
played = [times(n, 8, a100) for n in tokens]
assert [next(iter(played[n])) for n in (0, 6, 11)] == ["gather", "lv-xattn", "ring"]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 4), dpi=90, layout="constrained")
for schedule, colour, place in (("lv-xattn", COLOURS[0], 5), ("gather", COLOURS[3], 1)):
    gain = [t["ring"] / t[schedule] for t in played]
    axes.plot(tokens, gain, "o-", color=colour)
    axes.text(tokens[place], 1.25 * gain[place], schedule, color=colour, weight="bold")
axes.axhline(1, color=COLOURS[1])
axes.text(tokens[0], 1.1, "ring", color=COLOURS[1], weight="bold")
axes.set(xscale="log", yscale="log", xlabel="text tokens", ylabel="times as fast as ring")
axes.set_xticks(tokens[::2], [f"{n:,}" for n in tokens[::2]])
axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)
axes.set_title("Llama 3-V, 8 frames, a100-16 (computed, not measured)", size=11, color=INK)
plt.show()

# %% [markdown]
# Few queries: `gather` is best. It pays for one latency and reads the keys once, where a ring pays
# at every hop ([notebook 2](02_why_queries_move.ipynb)). More of them: `lv-xattn`, whose hops hide
# behind computing. And where the queries weigh as much as a short video's keys, `ring`. (`ulysses`
# cannot be taken: 16 ranks do not divide 8 key-value heads.)
#
# ### Exercise 3: where Ring Attention begins to win
#
# Write a function that returns the smallest power of two of text tokens, from 16 up, at which Ring
# Attention is the best schedule for a video of so many frames.


# %% tags=["exercise"]
def first_ring(frames, machine):
    """Return the fewest text tokens, a power of two, at which ring is best."""
    raise NotImplementedError("first_ring is still to be written")


# %% tags=["check"]
with exercise.check("the longer the video, the longer the text at which Ring Attention wins"):
    for frames in (2, 8, 32):
        found = first_ring(frames, a100)
        best = [next(iter(times(n, frames, a100))) for n in (found // 2, found)]
        assert best[1] == "ring", f"{frames} frames, {found} tokens: {best[1]} is best"
        assert best[0] != "ring", f"{frames} frames: ring is best with {found // 2} tokens already"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def first_ring(frames, machine):
#     """Return the fewest text tokens, a power of two, at which ring is best."""
#     text_tokens = 16
#     while next(iter(times(text_tokens, frames, machine))) != "ring":
#         text_tokens *= 2
#     return text_tokens
# ```
#
# </details>

# %% [markdown]
# ## Starting on a cluster
#
# A job for two hosts of four GPUs under Slurm, one rank a GPU:

# %%
job = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
module load openmpi        # a CUDA-aware MPI, as the cluster calls it
source .venv/bin/activate  # where all hosts see it
export LVXATTN_TIMEOUT=120
lvxattn="srun --mpi=pmix --cpus-per-task=16 python -m mpi4py -m lvxattn.mpi_impl"
$lvxattn doctor &&
$lvxattn run --device gpu --model llama3v --frames 64 --backward --check
"""
checked = subprocess.run(["bash", "-n"], input=job, text=True, check=False)
assert checked.returncode == 0  # a valid script; there is no Slurm here to run it

# %% [markdown]
# `-m mpi4py` sees to it that an error on one rank ends all of them. `LVXATTN_TIMEOUT` ends a run in
# which a rank waits longer than that. `run --check` holds sampled rows against a softmax in
# float64. With CuPy, `q`, `k` and `v` are on the GPU (`--device gpu` ends a run that would have to
# do without), and MPI has to get at them: a *CUDA-aware* MPI is handed the device's memory; for any
# other, blocks are copied through the host's.
#
# `doctor` says what can be known before a job is wasted: whether the ranks see one another, how
# many there are on which host, whether they fight for cores or share a GPU, whether MPI is
# CUDA-aware.
#
# **Predict.** A program is started twice without a launcher, or with the launcher of another MPI.
# What is `comm.size`?
#
# <details><summary>Reasoning</summary>
#
# 1 in every process: nobody told them of one another. Each computes alone, without an error, and
# the whole job is done as many times as there are processes. (The commands of `lvxattn` compare
# with what the launcher has set, and refuse; your own program will not.)
#
# </details>

# %% tags=["varies"]
labels = ("launcher", "ranks", "CUDA-aware")  # of the lines that are shown here
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
# On a cluster a rank may stop for reasons of its own. Then the others wait for its blocks, and with
# `LVXATTN_TIMEOUT` each says for what, at hop 1, 2, ...
#
# **Predict.** Three ranks in a ring, $0 \to 1 \to 2 \to 0$; rank 2 sleeps instead of attending.
# What do ranks 0 and 1 wait for, and how do you see from it which one has stopped?
#
# <details><summary>Reasoning</summary>
#
# Rank 0 waits for the queries of rank 2. Rank 1 gets those of rank 0 and then waits for those of
# rank 2, too, which rank 0 cannot pass on. Rank 2 says nothing: the one that is silent has stopped.
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
ranks = [*find_mpiexec(), "-n", "3", sys.executable, "-m", "mpi4py", "-c", program]
environment = {**os.environ, "LVXATTN_TIMEOUT": "2"}
ended = subprocess.run(ranks, capture_output=True, text=True, check=False, env=environment)
said = [line.split(";")[0] for line in ended.stderr.splitlines() if "has waited" in line]
print("\n".join(sorted(said)))
assert ended.returncode == 124
assert [line[:6] for line in sorted(said)] == ["rank 0", "rank 1"]

# %% [markdown]
# ## Reading a trace
#
# `run --plot-trace FILE.png` draws what every rank did when, as in
# [notebook 4](04_real_ranks_with_mpi.ipynb). `--trace FILE` writes it in a format that
# [ui.perfetto.dev](https://ui.perfetto.dev) opens: a process a rank, with a track for computing,
# for sending and for waiting. It is JSON, a list of events. `"ph": "X"` is a slice of a track, with
# its beginning `ts` and length `dur` in microseconds; `pid` is the rank and `tid` the track. `"s"`
# begins an arrow, which follows a block on its way, and `"i"` is an instant: a pass begins.
#
# **Predict.** Four ranks, forward and backward, LV-XAttn. How many slices of sending are there? How
# many of computing? (A rank's work on its own block comes in two parts, one at each end.)
#
# <details><summary>Reasoning</summary>
#
# Sending: 2 passes, 4 ranks, 3 hops of queries and 3 of results: 48. Computing: 2 passes, 4 ranks,
# 3 visiting blocks and 2 parts of the own one: 40.
#
# </details>

# %%
sizes = "--text-tokens 512 --visual-tokens 4096 --backward --repeat 2 --quiet"
ranks = [*find_mpiexec(), "-n", "4", sys.executable, "-m", "mpi4py", "-m", "lvxattn.mpi_impl"]
with tempfile.TemporaryDirectory() as folder:
    files = [str(Path(folder) / name) for name in ("trace.json", "trace.png")]
    options = [*sizes.split(), "--trace", files[0], "--plot-trace", files[1]]
    subprocess.run([*ranks, "run", *options], check=True)
    events = json.loads(Path(files[0]).read_text())["traceEvents"]
    picture = Path(files[1]).read_bytes()

# %%
slices = [event for event in events if event["ph"] == "X"]
count = Counter(event["name"].split()[0] for event in slices)
tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
print(sorted(set(tracks.values())), "sent:", count["send"], "computed:", count["compute"])
assert (count["send"], count["compute"]) == (48, 40)
assert {event["pid"] for event in slices} == {0, 1, 2, 3}
assert sum(event["ph"] == "s" for event in events) == 2 * 4 * 2  # a pass: 4 queries, 4 results

# %% tags=["varies"]
Image(picture, alt="What four ranks did when, and an arrow for every block")

# %% [markdown]
# Three questions to ask of a trace. Is there orange? Then a rank only waits; the arrow that ends
# there says for whose block. Is it always the same rank that the others wait for? Then that one has
# more keys, fewer cores or a worse link. Is there a gap between the blue, and no orange below it?
# Then neither computing nor waiting takes the time: merging, copying, Python.
#
# ## What was shown
#
# - A test with random tensors passes a kernel whose maximum starts at 0. The oracle fails it on two
#   of its cases and names the bug; what it has no case for, you add.
# - A machine is a dozen numbers, measured in seconds or taken from a preset. They settle which
#   schedule is best: few queries all at once, more of them round a ring, a long text and a short
#   video by Ring Attention.
# - Before a run ask `doctor`; during it `LVXATTN_TIMEOUT` finds the rank that stopped; after it the
#   trace says who waited for what.
#
# Files: [src/lvxattn/check](../src/lvxattn/check/README.md),
# [src/lvxattn/plan/choose.py](../src/lvxattn/plan/choose.py),
# [src/lvxattn/plan/measure.py](../src/lvxattn/plan/measure.py),
# [src/lvxattn/plan/trace_file.py](../src/lvxattn/plan/trace_file.py),
# [mpi_impl/transport/watchdog.py](../mpi_impl/transport/watchdog.py). All options are in
# [docs/commands.md](../docs/commands.md), all variables in
# [docs/clusters.md](../docs/clusters.md).
#
# This is the last notebook; [notebook 1](01_merging_softmax.ipynb) is about the merge on which all
# of it rests.
