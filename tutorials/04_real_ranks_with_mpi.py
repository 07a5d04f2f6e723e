# %% [markdown]
# # 4. Real ranks with MPI
#
# You will learn to write an MPI program that passes blocks round a ring, to find the cause of a
# deadlock, and to measure how much of the communication overlaps with computing.
#
# Prerequisites: [notebook 3](03_the_ring_in_one_process.ipynb) for the ring. Time: about 30
# minutes.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
import sys

import matplotlib.pyplot as plt
import numpy as np
from exercise import check
from matplotlib.patches import Rectangle

from lvxattn.common.meter import Block
from lvxattn.common.timeline import Post, Span, Timeline
from lvxattn.common.wire import QUERIES
from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.draw.trace import draw_trace
from lvxattn.mpi_impl.commands.demo.patches import PATCH
from lvxattn.mpi_impl.commands.demo.sources import default_video
from lvxattn.plan import messages, planned
from lvxattn.plan.trace import Trace
from lvxattn.reference import full_attention

# %% [markdown]
# ## Ranks are processes
#
# MPI starts $P$ copies of one program. Each copy is a *rank*: a separate process with a number $r$
# from 0 to $P - 1$, which runs the same program as all others. Ranks communicate through a
# *communicator*, which has the rank's number (`comm.rank`) and the number of ranks (`comm.size`).
#
# A cell that begins with `%%mpi 4` runs not in the notebook's process but in four new ones; the
# output of each is shown with its rank. `--take` copies variables of the notebook to every rank;
# `--give` copies variables of rank 0 back to the notebook. The processes end with the cell, so each
# such cell contains its own imports and functions.
#
# `gather` collects an object of every rank in a list, on rank 0.
#
# **Predict.** The notebook has an empty list, and every rank appends its number to it. What does
# the list contain on rank 2, and what in the notebook?
#
# <details><summary>Reasoning</summary>
#
# Processes share no memory: each rank gets a copy. Rank 2 has [2], and the notebook has [].
#
# </details>

# %%
numbers = []

# %%
# %%mpi 4 --take numbers --give lists,processes
import os

from mpi4py import MPI

comm = MPI.COMM_WORLD
numbers.append(comm.rank)
print("one of", comm.size, "ranks, with the list", numbers)
lists, processes = comm.gather(numbers), comm.gather(os.getpid())

# %%
assert lists == [[0], [1], [2], [3]]
assert len(set(processes)) == 4  # four different processes
assert numbers == []

# %% [markdown]
# Data of another rank has to be received in a message.
#
# ## One hop: send to the right, receive from the left
#
# In a ring, rank $r$ sends to its right neighbour $(r + 1) \bmod P$ and receives from its left one,
# $(r - 1) \bmod P$. `Sendrecv` does both, and returns when both are done. The block that is sent
# and the buffer for the block that is received are two arrays. (Methods with a capital letter send
# the memory of an array. `send`, `recv` and `gather`, in lower case, take any Python object and
# pickle it.)
#
# **Predict.** Every rank first sends its own block, and then forwards the block that it received
# last. Whose block does rank 0 have after 3 hops?
#
# <details><summary>Reasoning</summary>
#
# A block moves one place to the right at every hop. After $h$ hops rank $r$ has the block of rank
# $(r - h) \bmod P$; for $r = 0$, $h = 3$ and $P = 4$ that is rank 1.
#
# </details>

# %%
# %%mpi 4 --give holds
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room, owners = np.full(1000, comm.rank), np.empty(1000, int), [comm.rank]
for _ in range(1, comm.size):
    comm.Sendrecv(block, right, recvbuf=room, source=left)
    block, room = room, block  # forward what was received
    owners.append(int(block[0]))
holds = comm.gather(owners)

# %%
assert holds == [[(r - h) % 4 for h in range(4)] for r in range(4)]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 3), dpi=100, layout="constrained")
for r, owners in enumerate(holds):
    for h, owner in enumerate(owners):
        axes.add_patch(Rectangle((h - 0.45, r - 0.4), 0.9, 0.8, color=COLOURS[owner]))
        text = f"block of {owner}"
        axes.text(h, r, text, ha="center", va="center", color="white", weight="bold")
axes.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), xlabel="hops")
axes.set_xticks(range(4))
axes.set_yticks(range(4), [f"rank {r}" for r in range(4)])
axes.spines[:].set_visible(False)
axes.tick_params(length=0)
axes.set_title("Each block moves down one rank per hop", size=11, color=INK)
plt.show()

# %% [markdown]
# After $P - 1$ hops every block has been on every rank. `layout.owner(hop)` in
# [src/lvxattn/common/layout.py](../src/lvxattn/common/layout.py) is this table's formula.
#
# ## Computing during a hop: Isend and Irecv
#
# A rank cannot compute during `Sendrecv`. `Isend` and `Irecv` (I for immediate) only start to send
# and to receive. They return a *request*, and the rank goes on computing. `request.Wait()` returns
# when the block has been sent or received. Until then MPI uses its array: a send buffer must not be
# written, and a receive buffer must not be read.
#
# **Predict.** Rank 0 starts to send eight megabytes of ones, and overwrites them with sevens before
# it waits. What does rank 1 receive?
#
# <details><summary>Reasoning</summary>
#
# By the standard, this is an error with undefined results. MPI does not copy a large block, it
# reads it when the receiver is ready. Here that is after the barrier, at which all ranks wait for
# one another, so sevens are received. There is no warning.
#
# </details>

# %%
# %%mpi 2 --give means
import numpy as np
from mpi4py import MPI

comm, block = MPI.COMM_WORLD, np.ones(1_000_000)
if comm.rank == 0:
    request = comm.Isend(block, 1)
    block[:] = 7  # too early
comm.Barrier()
if comm.rank == 0:
    request.Wait()
else:
    comm.Recv(block, 0)
means = comm.gather(float(block.mean()))

# %% tags=["varies"]
print("rank 1 received the mean", means[1])
assert means[1] != 1.0

# %% [markdown]
# A send buffer may be read. So a ring that computes while blocks move needs two arrays: one that is
# sent and computed with, and one that is received into; they are swapped at every hop (double
# buffering).
#
# **Predict.** Every rank sums up all blocks, a thousand numbers each, while they rotate. What is
# the sum on each of four ranks?
#
# <details><summary>Reasoning</summary>
#
# Every rank has every block once: 1,000 · (0 + 1 + 2 + 3) = 6,000 on all ranks.
#
# </details>

# %%
# %%mpi 4 --give sums
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room, total = np.full(1000, comm.rank), np.empty(1000, int), 0
for _ in range(1, comm.size):
    requests = [comm.Irecv(room, left), comm.Isend(block, right)]
    total += int(block.sum())  # while both are under way
    MPI.Request.Waitall(requests)
    block, room = room, block
sums = comm.gather(total + int(block.sum()))

# %%
assert sums == [6000, 6000, 6000, 6000]

# %% [markdown]
# `Rotation` in [mpi_impl/exchange.py](../mpi_impl/exchange.py) is essentially the body of this
# loop.
#
# ## Deadlock
#
# `Send` returns when its array may be reused. For a small block that is at once, because MPI copies
# it into a buffer; for a large one it is when the receiver has received it. `Ssend` (synchronous)
# waits for the receiver regardless of the size.
#
# **Predict.** Every rank sends one number to the right, then receives from the left. Does the
# program end with `Send`? With `Ssend`? With `Send` and a million numbers?
#
# <details><summary>Reasoning</summary>
#
# Yes, no, no. A small Send returns before any rank has received. In the other two cases every rank
# waits for its right neighbour to receive, which waits for its own right neighbour, and so on round
# the ring: no rank reaches its Recv.
#
# </details>

# %%
# %%mpi 4 --give received
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room = np.full(1, comm.rank), np.empty(1, int)
comm.Send(block, right)
comm.Recv(room, left)
received = comm.gather(int(room[0]))

# %%
assert received == [3, 0, 1, 2]

# %% [markdown]
# The next cell is the same with `Ssend`, and a time limit of 4 seconds, after which `%%mpi` reports
# the line of each rank, and ends all of them.

# %% tags=["raises-exception"]
# %%mpi 4 --timeout 4
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room = np.full(1, comm.rank), np.empty(1, int)
comm.Ssend(block, right)
comm.Recv(room, left)

# %%
told = str(sys.last_value)  # what the cell above raised
assert told.count("is at line 7: comm.Ssend(block, right)") == 4

# %% [markdown]
# All four ranks are at the same line, each waiting for its right neighbour to receive:

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 1.6), dpi=100, layout="constrained")
for r in range(4):
    axes.text(r, 0, f"rank {r}\nin Ssend", ha="center", va="center", color="white", weight="bold",
              bbox={"boxstyle": "round", "fc": COLOURS[r], "ec": "none"})  # fmt: skip
    bend = "arc3,rad=-0.18" if r == 3 else "arc3"
    start, end = ((3, -0.35), (0, -0.35)) if r == 3 else ((r + 0.28, 0), (r + 0.72, 0))
    arrow = {"arrowstyle": "-|>", "color": INK, "connectionstyle": bend, "lw": 1.5}
    axes.annotate("", end, start, arrowprops=arrow)
    axes.text((start[0] + end[0]) / 2, -0.8 if r == 3 else 0.12, "waits for", ha="center", size=9)
axes.set(xlim=(-0.5, 3.5), ylim=(-1.1, 0.6))
axes.axis("off")
plt.show()

# %% [markdown]
# A cycle of waiting ranks is a *deadlock*. Now `Send` with a million numbers:

# %% tags=["raises-exception"]
# %%mpi 4 --timeout 4
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room = np.full(1_000_000, comm.rank), np.empty(1_000_000, int)
comm.Send(block, right)
comm.Recv(room, left)

# %%
told = str(sys.last_value)
assert told.count("is at line 7: comm.Send(block, right)") == 4

# %% [markdown]
# So a program that sends before it receives may pass every test on small blocks, and deadlock on
# real ones. Replacing `Send` by `Ssend` reveals this on small blocks, too. `Sendrecv`, or `Irecv`
# before any call that waits, cannot form the cycle: the receive is posted before any rank waits.
#
# ### Exercise 1: fix the deadlock
#
# Move `block` one place to the right with one call of `Ssend` and one of `Recv` on each rank, so
# that the program ends on any number of ranks from 2 up.

# %% tags=["exercise"]
# %%mpi 4 --timeout 5 --give shifted
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room = np.full(1, comm.rank), np.full(1, -1)
# Insert here: Ssend and Recv, in an order without a deadlock.
shifted = comm.gather(int(room[0]))

# %% tags=["check"]
with check("every block has moved one place, without a deadlock"):
    assert shifted == [3, 0, 1, 2], f"expected [3, 0, 1, 2] on ranks 0 to 3, got {shifted}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# One rank that receives first breaks the cycle. If every second rank receives first, the hop takes
# two rounds instead of $P$, because pairs of ranks communicate at the same time.
#
# ```python
# %%mpi 4 --timeout 5 --give shifted
# import numpy as np
# from mpi4py import MPI
#
# comm = MPI.COMM_WORLD
# right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
# block, room = np.full(1, comm.rank), np.full(1, -1)
# if comm.rank % 2:
#     comm.Recv(room, left)
#     comm.Ssend(block, right)
# else:
#     comm.Ssend(block, right)
#     comm.Recv(room, left)
# shifted = comm.gather(int(room[0]))
# ```
#
# </details>

# %% [markdown]
# ## Overlap on a timeline
#
# `cross_attention` of [mpi_impl](../mpi_impl/cross_attention.py) is LV-XAttn (arXiv:2502.02406,
# algorithm 1) on MPI ranks: $P - 1$ times `Irecv` and `Isend`, attention to this rank's keys, then
# a wait. A `Timeline` passed as `meter=` records when this rank computed, when it only waited, and
# when it started to send a block. `Trace.of` combines the timelines of all ranks. (All ranks are on
# one host and use the same clock.)
#
# There are $S_Q$ queries and $S_{KV}$ keys in total; each rank has a shard of both (`shard`). The
# first call is a warm-up and is not recorded.
#
# **Predict.** How many blocks does a rank of four send in one forward pass?
#
# <details><summary>Reasoning</summary>
#
# Queries make $P - 1$ hops, and so do the results that follow them: $2 (P - 1) = 6$.
#
# </details>

# %%
S_Q, S_KV, H, D = 256, 16384, 8, 64  # queries, keys, heads, head dimension

# %%
# %%mpi 4 --take S_Q,S_KV,H,D --give timelines
import numpy as np
from mpi4py import MPI

from lvxattn.common.timeline import Timeline
from lvxattn.mpi_impl import cross_attention, shard

comm, rng = MPI.COMM_WORLD, np.random.default_rng(0)
Q, K, V = (rng.standard_normal((1, H, s, D), dtype=np.float32) for s in (S_Q, S_KV, S_KV))
q, k, v = (shard(x, comm) for x in (Q, K, V))
cross_attention(q, k, v, comm)
timeline = Timeline()
comm.Barrier()
cross_attention(q, k, v, comm, meter=timeline)
timelines = comm.gather(timeline)

# %%
trace = Trace.of(timelines)
assert len(trace.trips) == 4 * 2 * (4 - 1)
assert all(trip.taken for trip in trace.trips)  # every block that was sent was received
layout = planned((1, H, S_Q, D), (1, H, S_KV, D), 4, dtype="float32")
for rank, timeline in enumerate(timelines):
    assert timeline.bytes == sum(message.nbytes for message in messages(layout, rank))

# %% [markdown]
# The bytes are those that the plan predicts. The trace shows when they were sent:

# %% tags=["varies"]
draw_trace(trace, "LV-XAttn")

# %% [markdown]
# A rank's row has three tracks. Blue: it computes, with the block of the rank whose number is
# shown. Green: the send of a block is not yet known to be complete. Orange: it only waits. An arrow
# leads from the time at which a block is posted to the time at which its receiver takes it; dashed
# arrows are results, which follow their queries. The part of an arrow below its receiver's blue was
# hidden; if an arrow ends in orange, its receiver waited for the block.
#
# `trace.overlap()` sums these times up. For each rank, in seconds:
#
# - *on the way*: a block was on the way to it or from it,
# - *hidden*: the part of it during which the rank computed,
# - *exposed*: the part of it during which the rank only waited.
#
# The rest of the first was spent on other work: merging, copying and, if there are more ranks than
# cores, other ranks. A block counts as on the way from just before it is sent until the receiver
# takes it; it may have arrived earlier, while the receiver computed.

# %%
for x in trace.overlap():
    assert x.hidden > 0
    assert x.hidden + x.exposed <= x.on_the_way * (1 + 1e-9)

# %% tags=["hide-input", "varies"]
figure, axes = plt.subplots(figsize=(8, 2.4), dpi=100, layout="constrained")
for rank, x in enumerate(trace.overlap()):
    parts = (x.hidden, x.exposed, x.on_the_way - x.hidden - x.exposed)
    for part, start, colour in zip(parts, np.cumsum((0, *parts)), COLOURS, strict=False):
        axes.barh(rank, 1e3 * part, left=1e3 * start, color=colour, height=0.7)
for n, name in enumerate(("hidden", "exposed", "the rest")):
    axes.text(0.4 * n, 1.04, name, color=COLOURS[n], weight="bold", transform=axes.transAxes)
axes.set(xlabel="milliseconds on the way", ylim=(3.5, -0.5))
axes.set_yticks(range(4), [f"rank {rank}" for rank in range(4)])
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Orange is the time that a better schedule or a faster link could still save. With few queries and
# many keys it can be small.
#
# ### Exercise 2: read a timeline
#
# This is a constructed trace of two ranks. Rank 0 posts its queries at 0 ms and computes for 3 ms.
# Rank 1 computes for 2 ms, and then waits for those queries until 3.5 ms.

# %%
queries = Block(QUERIES.name, owner=0, hop=1)
ms = 1e-3
trace = Trace.of(
    [
        Timeline(computed=[Span(0, 3 * ms, Block("its own"))], posted=[Post(0, 1, 800, queries)]),
        Timeline(
            computed=[Span(0, 2 * ms, Block("its own"))],
            waited=[Span(2 * ms, 3.5 * ms, queries._replace(source=0))],
        ),
    ]
)
draw_trace(trace, "A constructed pass")

# %% [markdown]
# For both ranks, how many milliseconds was a block on the way, how many of them were hidden, and
# how many exposed?

# %% tags=["exercise"]
rank_0 = None, None, None  # on the way, hidden, exposed, in milliseconds
rank_1 = None, None, None

# %% tags=["check"]
with check("hidden and exposed time on both ranks"):
    for rank, told in enumerate((rank_0, rank_1)):
        assert None not in told, f"rank {rank}: expected three numbers, got {told}"
        right = [1e3 * x for x in trace.overlap()[rank]]
        for name, x, y in zip(("on the way", "hidden", "exposed"), told, right, strict=True):
            assert abs(x - y) < 1e-6, f"rank {rank}, {name}: {x} ms is not what the tracks show"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# For both ranks the queries are on the way from 0 to 3.5 ms. Rank 0 computes during 3 ms of that;
# in the last half millisecond it is idle, but it does not wait for a block, so nothing is exposed.
# Rank 1 computes for 2 ms, and waits for 1.5 ms.
#
# ```python
# rank_0 = 3.5, 3, 0
# rank_1 = 3.5, 2, 1.5
# ```
#
# </details>

# %% [markdown]
# ## The merge as an MPI.Op
#
# There are few queries. If every rank holds all of them, each attends to its own keys, and the $P$
# partial results are merged by a reduction. A partial result is `out`, the weighted mean of the
# values, and `lse`, the log of the sum of the exponentiated scores ([notebook
# 1](01_merging_softmax.ipynb)).
#
# **Predict.** `allreduce` sums an object over all ranks. Is the sum of the four `out`, divided by
# 4, the correct result?
#
# <details><summary>Reasoning</summary>
#
# No. A rank whose keys score higher for a query must have more weight in its row; the mean gives
# all ranks the same weight.
#
# </details>

# %%
rng = np.random.default_rng(1)
Q, K, V = (2 * rng.standard_normal((1, 1, s, 8)) for s in (6, 40, 40))
truth_out, truth_lse = full_attention(Q, K, V)

# %%
# %%mpi 4 --take Q,K,V --give mean
from mpi4py import MPI

from lvxattn.mpi_impl import block_attention, shard

comm = MPI.COMM_WORLD
out, lse = block_attention(Q, shard(K, comm), shard(V, comm), scale=8**-0.5)
mean = comm.allreduce(out) / comm.size

# %%
assert abs(mean - truth_out).max() > 0.1

# %% [markdown]
# The correct operator is the merge (arXiv:2502.02406, section 3):
#
# $$\mathrm{lse} = \log\left(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}\right), \qquad
# \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}}\,\mathrm{out}_a
# + e^{\mathrm{lse}_b - \mathrm{lse}}\,\mathrm{out}_b$$
#
# MPI accepts any associative function as an operator, and may merge the partial results in any
# grouping. It calls `join(a, b, datatype)` with two buffers and expects the result in `b`. It may
# also split a message between any two elements. To keep a query's `out` and `lse` together, an
# element is a whole row, 8 numbers of `out` and one of `lse`; `Create_contiguous` defines this
# datatype.
#
# ### Exercise 3: write the operator
#
# `a` and `b` below are arrays of rows: `a[:, :8]` is `out`, `a[:, 8]` is `lse`. Leave the merged
# rows in `b`. `merge(out_a, lse_a, out_b, lse_b)`, also in `lvxattn.mpi_impl`, returns `out` and
# `lse`.

# %% tags=["exercise"]
# %%mpi 4 --take Q,K,V --give joined
import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import block_attention, shard


def join(a, b, datatype):
    """Merge the rows in a into those in b."""
    a, b = (np.frombuffer(x).reshape(-1, 9) for x in (a, b))
    b[:] += a  # a sum, not the merge


comm = MPI.COMM_WORLD
out, lse = block_attention(Q, shard(K, comm), shard(V, comm), scale=8**-0.5)
rows = np.concatenate([out[0, 0], lse[0, 0, :, None]], axis=1)  # (6, 9)
joined, row = np.empty_like(rows), MPI.DOUBLE.Create_contiguous(9).Commit()
comm.Allreduce([rows, 6, row], [joined, 6, row], MPI.Op.Create(join, commute=True))

# %% tags=["check"]
with check("MPI merges the partial results of all ranks"):
    error = abs(joined[:, 8] - truth_lse[0, 0]).max()
    assert error < 1e-12, f"lse: expected an error below 1e-12, got {error:.2g}"
    error = abs(joined[:, :8] - truth_out[0, 0]).max()
    assert error < 1e-12, f"lse is correct; out: expected an error below 1e-12, got {error:.2g}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# %%mpi 4 --take Q,K,V --give joined
# import numpy as np
# from mpi4py import MPI
#
# from lvxattn.mpi_impl import block_attention, merge, shard
#
#
# def join(a, b, datatype):
#     """Merge the rows in a into those in b."""
#     a, b = (np.frombuffer(x).reshape(-1, 9) for x in (a, b))
#     b[:, :8], b[:, 8] = merge(a[:, :8], a[:, 8], b[:, :8], b[:, 8])
#
#
# comm = MPI.COMM_WORLD
# out, lse = block_attention(Q, shard(K, comm), shard(V, comm), scale=8**-0.5)
# rows = np.concatenate([out[0, 0], lse[0, 0, :, None]], axis=1)  # (6, 9)
# joined, row = np.empty_like(rows), MPI.DOUBLE.Create_contiguous(9).Commit()
# comm.Allreduce([rows, 6, row], [joined, 6, row], MPI.Op.Create(join, commute=True))
# ```
#
# </details>

# %% [markdown]
# [mpi_impl/collectives.py](../mpi_impl/collectives.py) creates this operator for any dtype and
# width. With `queries="replicated"`, `cross_attention` is block attention followed by this
# reduction:

# %%
# %%mpi 4 --take Q,K,V --give out,lse
from mpi4py import MPI

from lvxattn.mpi_impl import cross_attention, shard

comm = MPI.COMM_WORLD
out, lse = cross_attention(Q, shard(K, comm), shard(V, comm), comm, queries="replicated")

# %%
assert abs(out - truth_out).max() < 1e-12
assert abs(lse - truth_lse).max() < 1e-12

# %% [markdown]
# ## A search in a long video
#
# `make demo` searches a video for small patches. This is its core, on a short video in which a
# camera pans over twelve photographs. Each of four ranks generates its own frames and divides them
# into patches of 16 × 16 pixels. A patch is a visual token:
#
# - its key is a descriptor: brightness in 64 cells, mean removed, normalised to length 1
#   (`describe`);
# - its value is its position: frame, row, column (`places`);
# - a query is the key of a noisy copy of a patch that another rank holds (`choose_queries`).
#
# So the product of a query and a key is the similarity of two patches. The scale is large, 1000:
# nearly all the weight is on the most similar key, and `out` is its position.
#
# **Predict.** A rank has 4 queries of 64 numbers; a result is 3 numbers of `out` and two of `lse`;
# a number has 4 bytes. How many bytes does a rank send? How many if its 3,600 keys and values, of
# 64 and 3 numbers, travelled instead?
#
# <details><summary>Reasoning</summary>
#
# Three hops each: 3 · 4 · (64 + 3 + 2) · 4 = 3,312 bytes, against 3 · 3,600 · 67 · 4 = 2.9 MB.
#
# </details>

# %%
video = default_video(frames=48, seed=0)

# %%
# %%mpi 4 --take video --give found,meters
import numpy as np
from mpi4py import MPI

from lvxattn.common.layout import share
from lvxattn.mpi_impl import Meter, cross_attention
from lvxattn.mpi_impl.commands.demo.patches import D, choose_queries, describe, places
from lvxattn.mpi_impl.commands.demo.search import SCALE

comm, meter = MPI.COMM_WORLD, Meter()
mine, rng = share(video.frames, comm.rank, comm.size), np.random.default_rng([0, comm.rank])
frames = video.read(mine.start, mine.stop, lambda _: None)  # (12, 240, 320, 3)
k = describe(frames).reshape(1, 1, -1, D)
v = places(mine.start, mine.stop, video.rows, video.cols).reshape(1, 1, -1, 3)
truth, seen = choose_queries(frames, mine.start, 16, comm, rng)
q = describe(seen).reshape(1, 1, -1, D)
out, _ = cross_attention(q, k, v, comm, scale=SCALE, meter=meter)
found, meters = comm.gather((truth, seen, out[0, 0])), comm.gather(meter.totals())

# %%
right = [np.all(np.rint(out) == truth.place, axis=1) for truth, _, out in found]
assert np.concatenate(right).mean() >= 0.9
assert [meter.bytes for meter in meters] == 4 * [3 * 4 * (64 + 3 + 2) * 4]
per_rank = 48 // 4 * video.rows * video.cols
assert per_rank == 3600
print(f"a rank sent {meters[0].bytes:,} bytes; keys and values: {3 * per_rank * 67 * 4:,}")

# %% [markdown]
# One result of each rank: the noisy patch and, in a frame of another rank, a box at the position
# that the attention returned.

# %% tags=["hide-input"]
figure, rows = plt.subplots(
    2, 4, figsize=(8, 3.4), dpi=100, layout="constrained", height_ratios=(1, 1.6)
)
for rank, ((truth, seen, out), n) in enumerate(zip(found, (1, 3, 3, 2), strict=True)):
    frame, row, col = np.rint(out[n]).astype(int)
    rows[0, rank].imshow(seen[n])
    rows[0, rank].set_title(f"query of rank {rank}", size=10, color=INK)
    rows[1, rank].imshow(video.read(frame, frame + 1, lambda _: None)[0])
    for colour, width in (("black", 4), ("#F0E442", 2)):
        corner = PATCH * col - 3, PATCH * row - 3
        box = Rectangle(corner, PATCH + 5, PATCH + 5, fill=False, ec=colour, lw=width)
        rows[1, rank].add_patch(box)
    rows[1, rank].set_title(f"found on rank {truth.holder[n]}", size=10, color=INK)
    rows[1, rank].set_xlabel(f"frame {frame}, row {row}, col {col}", size=9)
for axes in rows.flat:
    axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Every query was compared with every patch of every rank, and no key and no value was sent. The
# whole demo ([demo/search.py](../mpi_impl/commands/demo/search.py)) does the same with 360 frames
# and 256 queries, checks each answer, and accepts your own video: `make demo ARGS="--video FILE"`.
#
# ## Summary
#
# - Ranks are processes that share no memory. `Sendrecv` moves blocks one place round a ring; after
#   $P - 1$ hops every rank has had every block.
# - A cycle of ranks that wait for one another is a deadlock. `Irecv` and `Isend` post receives
#   first and return at once, so that a rank can compute; two buffers separate what is sent from
#   what is received.
# - A timeline shows how much of the communication was hidden. Because the merge is associative, MPI
#   can use it as the operator of a reduction.
#
# Files: [mpi_impl/exchange.py](../mpi_impl/exchange.py),
# [mpi_impl/collectives.py](../mpi_impl/collectives.py),
# [src/lvxattn/common/timeline.py](../src/lvxattn/common/timeline.py),
# [src/lvxattn/plan/trace.py](../src/lvxattn/plan/trace.py).
#
# Next: [notebook 5, going backward](05_going_backward.ipynb).
