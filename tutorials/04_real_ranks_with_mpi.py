# %% [markdown]
# # 4. Real ranks with MPI
#
# At the end you can write a program for several processes that pass blocks round a ring, say why
# it stands still when it does, and see how much of its communication is hidden behind computing.
#
# It needs [notebook 3](03_the_ring_in_one_process.ipynb), for the ring, and about 30 minutes.

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
# MPI starts $P$ copies of one program. A copy is a *rank*: a process of its own, with a number $r$
# from 0 to $P - 1$, that runs the same lines as all others. It reaches them through a
# *communicator*, which knows its number (`comm.rank`) and how many there are (`comm.size`).
#
# A cell that begins with `%%mpi 4` is not run by this notebook. It is sent to four new processes;
# what each of them prints is shown with its number. `--take` names variables of the notebook that
# every rank is to have; `--give` names variables of rank 0 that the notebook is to have afterwards.
# Processes end with their cell, so that each such cell begins with its imports, and defines the
# functions that it calls.
#
# `gather` collects an object of every rank in a list, on rank 0.
#
# **Predict.** The notebook has an empty list, and every rank appends its number to it. What is in
# the list of rank 2, and what is in that of the notebook?
#
# <details><summary>Reasoning</summary>
#
# Processes share no memory: each rank was sent a copy. Rank 2 has [2], and the notebook has [].
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
print("I am one of", comm.size, "and have", numbers)
lists, processes = comm.gather(numbers), comm.gather(os.getpid())

# %%
assert lists == [[0], [1], [2], [3]]
assert len(set(processes)) == 4  # four different processes
assert numbers == []

# %% [markdown]
# What a rank is to know of another one must be sent to it. That is all that the rest is about.
#
# ## One hop: send to the right, receive from the left
#
# In a ring, rank $r$ sends to its right neighbour $(r + 1) \bmod P$ and receives from its left one,
# $(r - 1) \bmod P$. `Sendrecv` does both, and returns when both are done. The block that is sent
# and the room for the block that comes are two arrays. (Names with a capital send the bytes of an
# array as they lie in memory. `send`, `recv` and `gather`, with a small letter, take any Python
# object and pickle it.)
#
# **Predict.** Every rank first sends a block of its own, and then on and on what it received last.
# Whose block does rank 0 have after 3 hops?
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
    block, room = room, block  # what came is what is sent next
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
axes.set_title("Each block moves one rank down at every hop", size=11, color=INK)
plt.show()

# %% [markdown]
# After $P - 1$ hops every block has been on every rank. `layout.owner(hop)` in
# [src/lvxattn/common/layout.py](../src/lvxattn/common/layout.py) is this table's formula.
#
# ## A hop while there is something to do: Isend and Irecv
#
# During `Sendrecv` a rank computes nothing. `Isend` and `Irecv` (I for immediate) only begin to
# send and to receive. They return a *request*, and the rank goes on computing. `request.Wait()`
# returns when the block is gone, or is there. Until then its array belongs to MPI: a block that is
# being sent must not be written, and room that is being filled must not be read.
#
# **Predict.** Rank 0 begins to send eight megabytes of ones, and overwrites them with sevens before
# it waits. What does rank 1 receive?
#
# <details><summary>Reasoning</summary>
#
# The standard forbids it and says nothing about what happens. MPI makes no copy of a large block,
# it reads it when the receiver is ready. That is after the barrier here, at which all ranks wait
# for one another, so that sevens arrive. Nothing warns.
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
# Reading is allowed while a block is being sent. So a ring that computes while blocks move needs
# two arrays, one that is being sent and computed with, and one that is being filled; they change
# places at every hop.
#
# **Predict.** Every rank adds up all blocks, a thousand numbers each, while they go round. What is
# the sum on each of four ranks?
#
# <details><summary>Reasoning</summary>
#
# Everybody sees every block once: 1,000 · (0 + 1 + 2 + 3) = 6,000 on all ranks.
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
# `Rotation` in [mpi_impl/exchange.py](../mpi_impl/exchange.py) is that loop's body and little more.
#
# ## Deadlock
#
# A plain `Send` returns once its array may be used again. With a small block that is at once,
# because MPI puts a copy aside. With a large one it is when the receiver has taken it. `Ssend`
# (synchronous) waits for the receiver whatever the size.
#
# **Predict.** Every rank sends one number to the right, then receives from the left. Does it end
# with `Send`? With `Ssend`? With `Send` and a million numbers?
#
# <details><summary>Reasoning</summary>
#
# Yes, no, no. A small Send returns before anybody has received. In the other two every rank waits
# for its right neighbour to receive, which itself waits for its right neighbour, and so on round
# the ring: nobody ever comes to its Recv.
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
# The next cell is the same with `Ssend`, and a limit of 4 seconds. `%%mpi` then says at which line
# each rank is, and ends all of them.

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
# All four are in the same line, each waiting for its right neighbour to receive:

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
# A closed chain of ranks that wait is a *deadlock*. Now `Send`, with a million numbers:

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
# So a program that sends before it receives may pass every test on small blocks, and stand still on
# real ones. Putting `Ssend` in place of `Send` shows that on small blocks, too. `Sendrecv`, or
# `Irecv` before anything that waits, cannot form the chain: the room is offered before anybody
# waits.
#
# ### Exercise 1: mend it
#
# Use `Ssend` and `Recv`, each once, and no other call that sends. Bring `block` one place to the
# right so that the program ends on any number of ranks from 2 up.

# %% tags=["exercise"]
# %%mpi 4 --timeout 5 --give shifted
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
block, room = np.full(1, comm.rank), np.full(1, -1)
# Here: Ssend and Recv, in an order in which somebody receives.
shifted = comm.gather(int(room[0]))

# %% tags=["check"]
with check("every block has moved one place, and nobody waits for ever"):
    assert shifted == [3, 0, 1, 2], f"expected [3, 0, 1, 2] on ranks 0 to 3, got {shifted}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# One rank that receives first breaks the chain. With every second one the hop takes two rounds, and
# not $P$, because pairs of ranks work at the same time.
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
# ## Overlap, seen on a timeline
#
# `cross_attention` of [mpi_impl](../mpi_impl/cross_attention.py) is LV-XAttn (arXiv:2502.02406,
# algorithm 1) on such ranks: `Irecv` and `Isend`, attention to this rank's keys, then a wait,
# $P - 1$ times. A `Timeline` handed over as `meter=` writes down when this rank computed, when it
# could only wait, and when it began to send a block. `Trace.of` puts the timelines of all ranks
# together. (All ranks are on one host and look at one clock.)
#
# There are $S_Q$ queries and $S_{KV}$ keys in all; a rank has a share of both (`shard`). The first
# call warms the caches up, and is not written down.
#
# **Predict.** How many blocks does a rank of four send in one forward pass?
#
# <details><summary>Reasoning</summary>
#
# Queries make $P - 1$ hops, and so do the results that follow them: $2 (P - 1) = 6$.
#
# </details>

# %%
S_Q, S_KV, H, D = 256, 16384, 8, 64  # queries, keys, heads, their width

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
# The bytes are those that the cost model foretold. This is when they moved:

# %% tags=["varies"]
draw_trace(trace, "LV-XAttn")

# %% [markdown]
# A rank's row has three tracks. Blue: it computes, with the block of the rank whose number is
# written there. Green: a block that it sends is not yet known to be gone. Orange: it can only wait.
# An arrow leads from where a block is posted to where its receiver has it in hand; dashed arrows
# are results, which follow their queries. Where an arrow leads along under its receiver's blue, its
# way was hidden. One that ends in orange was waited for.
#
# `trace.overlap()` adds that up. For each rank, in seconds,
#
# - *on the way*: something was on its way to it or from it,
# - *hidden*: of that, the rank computed meanwhile,
# - *exposed*: of that, it could only wait.
#
# What is left of the first went to other work: merging, copying, and where ranks outnumber cores
# also to other ranks. A block counts as on its way from just before it is sent until the receiver
# has it in hand; it may have arrived earlier, but a rank that computes does not look.

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
# Orange is the time that a better order of steps, or a faster link, could still save. Where queries
# are few, and the keys that each of them meets are many, there need not be much of it.
#
# ### Exercise 2: read a timeline
#
# Two ranks, made up by hand. Rank 0 posts its queries at 0 ms and computes for 3 ms. Rank 1
# computes for 2 ms, and then waits for those queries until 3.5 ms.

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
draw_trace(trace, "A made-up pass")

# %% [markdown]
# For both ranks, how many milliseconds was something on the way, how many of them were hidden, and
# how many exposed?

# %% tags=["exercise"]
rank_0 = None, None, None  # on the way, hidden, exposed, in milliseconds
rank_1 = None, None, None

# %% tags=["check"]
with check("you read what was hidden and what was exposed"):
    for rank, told in enumerate((rank_0, rank_1)):
        assert None not in told, f"rank {rank} is still to be filled in"
        right = [1e3 * x for x in trace.overlap()[rank]]
        for name, x, y in zip(("on the way", "hidden", "exposed"), told, right, strict=True):
            assert abs(x - y) < 1e-6, f"rank {rank}, {name}: {x} ms is not what the tracks show"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The queries are on the way from 0 to 3.5 ms, for both. Rank 0 computes during 3 ms of that; in the
# last half millisecond it has nothing to do, but it does not wait for this block, so nothing is
# exposed. Rank 1 computes during 2 ms, and waits for 1.5 ms.
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
# The queries are few. Where every rank holds all of them, each attends to its own keys, and the $P$
# partial results are to be joined: MPI calls that a reduction. Attention over some keys is `out`,
# the weighted mean of their values, and `lse`, the log of the sum of the exponentiated scores
# ([notebook 1](01_merging_softmax.ipynb)).
#
# **Predict.** `allreduce` adds up an object of every rank. Is the sum of the four `out`, divided by
# 4, the right result?
#
# <details><summary>Reasoning</summary>
#
# No. A rank whose keys fit a query well must count for more in its row; the mean counts all ranks
# alike.
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
# The right operator is the merge (arXiv:2502.02406, section 3):
#
# $$\mathrm{lse} = \log\left(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}\right), \qquad
# \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}}\,\mathrm{out}_a
# + e^{\mathrm{lse}_b - \mathrm{lse}}\,\mathrm{out}_b$$
#
# MPI takes any function as an operator, as long as it is associative: it may join any two partial
# results first. It calls `join(a, b, datatype)` with two pieces of memory and expects the result in
# `b`. It may also cut a message between any two elements. So that it never tears a query's `out`
# from its `lse`, an element is a whole row, 8 numbers of `out` and one of `lse`; that is what
# `Create_contiguous` is for.
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
    b[:] += a  # a sum: not what is wanted


comm = MPI.COMM_WORLD
out, lse = block_attention(Q, shard(K, comm), shard(V, comm), scale=8**-0.5)
rows = np.concatenate([out[0, 0], lse[0, 0, :, None]], axis=1)  # (6, 9)
joined, row = np.empty_like(rows), MPI.DOUBLE.Create_contiguous(9).Commit()
comm.Allreduce([rows, 6, row], [joined, 6, row], MPI.Op.Create(join, commute=True))

# %% tags=["check"]
with check("MPI merges partial results of all ranks"):
    error = abs(joined[:, 8] - truth_lse[0, 0]).max()
    assert error < 1e-12, f"lse is off by up to {error:.2g}"
    error = abs(joined[:, :8] - truth_out[0, 0]).max()
    assert error < 1e-12, f"lse is right, and out is off by up to {error:.2g}"

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
# [mpi_impl/collectives.py](../mpi_impl/collectives.py) makes this operator for any dtype and width.
# With `queries="replicated"`, `cross_attention` is block attention and that reduction:

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
# `make demo` searches a video for small patches; here is its core, on a short one, a camera that
# pans over twelve photographs. Each of four ranks makes the frames that it holds and cuts them into
# patches of 16 × 16 pixels. A patch is a visual token:
#
# - its key is what it looks like: brightness in 64 cells, mean removed, of length 1 (`describe`);
# - its value is where it is: frame, row, column (`places`);
# - a query is the key of a noisy copy of a patch that another rank holds (`choose_queries`).
#
# So the product of a query and a key is how alike two patches are. The scale is large, 1000: nearly
# all the weight goes to the key that is most alike, and `out` is its place.
#
# **Predict.** A rank asks 4 queries of 64 numbers; a result is 3 numbers of `out` and two of `lse`;
# a number has 4 bytes. How many bytes does a rank send? How many if its 3,600 keys and values, of
# 64 and 3 numbers, went round instead?
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
# One find of each rank: the noisy patch that was asked for and, in a frame that another rank holds,
# a box where the attention found it.

# %% tags=["hide-input"]
figure, rows = plt.subplots(
    2, 4, figsize=(8, 3.4), dpi=100, layout="constrained", height_ratios=(1, 1.6)
)
for rank, ((truth, seen, out), n) in enumerate(zip(found, (1, 3, 3, 2), strict=True)):
    frame, row, col = np.rint(out[n]).astype(int)
    rows[0, rank].imshow(seen[n])
    rows[0, rank].set_title(f"rank {rank} asks", size=10, color=INK)
    rows[1, rank].imshow(video.read(frame, frame + 1, lambda _: None)[0])
    for colour, width in (("black", 4), ("#F0E442", 2)):
        corner = PATCH * col - 3, PATCH * row - 3
        box = Rectangle(corner, PATCH + 5, PATCH + 5, fill=False, ec=colour, lw=width)
        rows[1, rank].add_patch(box)
    rows[1, rank].set_title(f"rank {truth.holder[n]} has it", size=10, color=INK)
    rows[1, rank].set_xlabel(f"frame {frame}, row {row}, col {col}", size=9)
for axes in rows.flat:
    axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Every query was compared with every patch of every rank, and no key and no value was sent.
# The whole demo ([demo/search.py](../mpi_impl/commands/demo/search.py)) does the same with 360
# frames and 256 queries, checks each answer, and takes a video of yours:
# `make demo ARGS="--video FILE"`.
#
# ## What was shown
#
# - Ranks are processes that share nothing. `Sendrecv` moves blocks one place round a ring; after
#   $P - 1$ hops everybody has had all.
# - A closed chain of ranks that wait for one another stands still. `Irecv` and `Isend` offer room
#   first and leave time to compute; two buffers keep what is sent apart from what comes.
# - A timeline tells what of the communication was hidden. Because the merge is associative, it can
#   be handed to MPI as the operator of a reduction.
#
# Files: [mpi_impl/exchange.py](../mpi_impl/exchange.py),
# [mpi_impl/collectives.py](../mpi_impl/collectives.py),
# [src/lvxattn/common/timeline.py](../src/lvxattn/common/timeline.py),
# [src/lvxattn/plan/trace.py](../src/lvxattn/plan/trace.py).
#
# Next: [notebook 5, going backward](05_going_backward.ipynb).
