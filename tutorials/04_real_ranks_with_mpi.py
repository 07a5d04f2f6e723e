# %% [markdown]
# # 4. Real ranks with MPI
#
# A ring that sends before it receives passes every test on small blocks. On real ones it hangs, on
# every rank, without an error message; you will see both, from the same few lines. On a cluster
# such a program occupies its nodes until the time limit, and its log is empty.
#
# **You will be able to**
#
# - write an MPI program that passes blocks round a ring and computes meanwhile,
# - find the cause of a deadlock, and reveal one that small blocks conceal,
# - measure on your machine how much of the communication is hidden, and what blocking costs.
#
# **Prerequisites.** [Notebook 3](03_the_ring_in_one_process.ipynb) for the ring. No knowledge of
# MPI.
#
# **Time.** About 45 minutes, with three exercises.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
import sys

import numpy as np
from exercise import check
from exercise_ranks import hops, reductions
from figures import ranks

from lvxattn.common.timeline import Post, Span, Timeline
from lvxattn.draw.trace import draw_trace
from lvxattn.plan import messages, planned
from lvxattn.plan.trace import Trace

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
assert len(set(processes)) == 4 and numbers == []
print("4 different processes; the notebook's own list is still", numbers)

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** Ranks share no memory. Data of another rank has to be received in a message.
#
# </div>
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
print("after h hops rank r holds the block of rank (r - h) mod 4")
ranks.blocks_by_hop(holds)

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
request.Wait() if comm.rank == 0 else comm.Recv(block, 0)
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
print("every rank has summed up all blocks:", *sums)

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
print("with Send and one number it ends: the ranks have received", *received)

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
print("all 4 ranks are in Ssend, none has reached Recv")

# %% [markdown]
# Each waits for its right neighbour to receive:

# %%
ranks.waiting_in_a_circle("Ssend")

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
print("all 4 ranks are in Send, with a million numbers each")

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** A program that sends before it receives may pass every test on small blocks, and
# deadlock on real ones. Replacing `Send` by `Ssend` reveals this on small blocks, too. `Sendrecv`,
# or `Irecv` before any call that waits, cannot form the cycle: the receive is posted before any
# rank waits.
#
# </div>
#
# ### Exercise 1: fix the deadlock
#
# Write `hop`, which moves `block` one place to the right, into the right neighbour's `room`, with
# one call of `comm.Ssend` and one of `comm.Recv` on each rank. It has to work on any number of
# ranks from 2 up. The check runs it on 2, 3, 4 and 5 ranks, with random blocks, and records what
# each rank calls. It says so if a rank waits for more than 3 seconds.


# %% tags=["exercise"]
def hop(comm, block, room):
    """Send block to the right; receive the left neighbour's block in room."""
    raise NotImplementedError("hop is not implemented")


# %% tags=["check", "hide-input"]
with check("every block moves one place, by one Ssend and one Recv on each of 2 to 5 ranks"):
    for count, moved in hops(hop, (2, 3, 4, 5)).items():
        for rank, (_, room, calls) in enumerate(moved):
            right, left = (rank + 1) % count, (rank - 1) % count
            did = f"on {count} ranks: rank {rank} called {', then '.join(calls) or 'nothing'}"
            expected = f"{did}; expected one Ssend to rank {right} and one Recv from rank {left}"
            assert sorted(call.split()[0] for call in calls) == ["Recv", "Ssend"], expected
            assert f"Ssend to rank {right}" in calls, expected
            assert np.array_equal(room, moved[left].block), (
                f"on {count} ranks: rank {rank} has not the block of rank {left} in room"
            )

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# One rank that receives first breaks the cycle. If every second rank receives first, the hop takes
# two rounds instead of $P$, because pairs of ranks communicate at the same time. (With an odd
# number of ranks, the last and the first both send first, which takes a third round.)
#
# ```python
# def hop(comm, block, room):
#     right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
#     if comm.rank % 2:
#         comm.Recv(room, left)
#         comm.Ssend(block, right)
#     else:
#         comm.Ssend(block, right)
#         comm.Recv(room, left)
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

comm, rng, timeline = MPI.COMM_WORLD, np.random.default_rng(0), Timeline()
Q, K, V = (rng.standard_normal((1, H, s, D), dtype=np.float32) for s in (S_Q, S_KV, S_KV))
q, k, v = (shard(x, comm) for x in (Q, K, V))
cross_attention(q, k, v, comm)
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
print(f"{len(trace.trips)} blocks, all received; each rank sent {timeline.bytes:,} bytes")

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
print("on every rank a part of the communication was hidden")

# %% tags=["varies"]
ranks.hidden_and_exposed(trace.overlap())

# %% [markdown]
# Orange is the time that a better schedule or a faster link could still save. With few queries and
# many keys it can be small.
#
# ### Exercise 2: read a timeline
#
# This is a constructed trace of two ranks. Rank 0 posts its queries at 0 ms and computes for 3 ms.
# Rank 1 computes for 2 ms, and then waits for those queries until 3.5 ms.

# %% tags=["hide-input"]
from lvxattn.common.meter import Block
from lvxattn.common.wire import QUERIES

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

# %% tags=["check", "hide-input"]
hints = {
    "on the way": "a block is on the way for both ranks, from when it is posted until it is taken",
    "hidden": "it is the part of the time on the way during which this rank's track is blue",
    "exposed": "it is the part during which this rank waits for a block, that is, orange",
}
with check("hidden and exposed time on both ranks"):
    for rank, told in enumerate((rank_0, rank_1)):
        assert len(told) == 3 and None not in told, f"rank {rank}: expected 3 numbers, got {told}"
        for (name, hint), x, y in zip(hints.items(), told, trace.overlap()[rank], strict=True):
            assert abs(x - 1e3 * y) < 1e-6, f"rank {rank}: {name} is not {x} ms; {hint}"

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
# ## Three programs on one time axis
#
# How much does it matter what travels, and that it travels during the computation? The next cell
# measures three programs on your machine, which compute the same:
#
# - `lv-xattn`: queries travel, while ranks compute;
# - `ring`, Ring Attention: keys and values travel, while ranks compute;
# - `blocking`: queries and results travel, but with `Sendrecv` after each computation. This is the
#   simple solution of [notebook 3](03_the_ring_in_one_process.ipynb), exercise 2.
#
# Each runs eight times, and the fastest run is drawn.
#
# **Predict.** How many times as many bytes as `lv-xattn` does `ring` send? Which of the three takes
# longest on your machine? And which one waits at every hop?
#
# <details><summary>Reasoning</summary>
#
# A block of queries and its result are 64 rows of 64 and of 66 numbers, for each head. A block of
# keys and values is 4,096 rows of 128: 63 times as many. On one machine, the link is memory, and
# the cores themselves copy the blocks: `ring` takes longest, although most of its communication is
# hidden. `blocking` waits at every hop, until its left neighbour has finished computing, too. The
# copying itself costs next to nothing here, as its blocks are short.
#
# </details>

# %% tags=["subject"]
# %%mpi 4 --take S_Q,S_KV,H,D --give tries,outs
from functools import partial

import numpy as np
from mpi4py import MPI

from lvxattn.common.meter import Block
from lvxattn.common.timeline import Timeline
from lvxattn.mpi_impl import block_attention, cross_attention, merge, shard

comm, rng = MPI.COMM_WORLD, np.random.default_rng(0)
P, right, left = comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
Q, K, V = (rng.standard_normal((1, H, s, D), dtype=np.float32) for s in (S_Q, S_KV, S_KV))
q, k, v = (shard(x, comm) for x in (Q, K, V))


def blocking(meter):
    """Attend, then send the block with its result, which nothing hides; P times."""
    block = np.zeros((1, H, q.shape[2], 2 * D + 1), np.float32)  # of each row q, out and lse
    block[..., :D], block[..., -1], room = q, -np.inf, np.empty_like(block)
    for hop in range(P):
        what = partial(Block, "the queries of rank {}", (comm.rank - hop) % P, hop)
        with meter.computes(what):
            part = block_attention(block[..., :D], k, v, scale=D**-0.5)
            block[..., D:-1], block[..., -1] = merge(block[..., D:-1], block[..., -1], *part)
        meter.sent(block.nbytes, right, what)
        with meter.waits(what):
            comm.Sendrecv(block, right, recvbuf=room, source=left)
        block, room = room, block
    return block[..., D:-1], block[..., -1]


def overlapping(meter, schedule):
    return cross_attention(q, k, v, comm, schedule=schedule, meter=meter)


programs = {schedule: partial(overlapping, schedule=schedule) for schedule in ("lv-xattn", "ring")}
programs["blocking"] = blocking
tries, outs = {name: [] for name in programs}, {}
for _ in range(8):  # in turn, as your machine may have other work at times
    for name, program in programs.items():
        timeline = Timeline()
        comm.Barrier()
        out, _ = program(timeline)
        tries[name].append(comm.gather(timeline))
        outs[name] = comm.gather(out)

# %%
sent = {name: runs[0][0].bytes for name, runs in tries.items()}
for name, out in outs.items():
    assert np.allclose(out, outs["lv-xattn"], rtol=0, atol=1e-5)
    print(f"{name:9} a rank sends {sent[name]:10,} bytes; the results are the same")
assert 62 < sent["ring"] / sent["lv-xattn"] < 64


# %% tags=["varies"]
def seconds(trace):
    return max(span.end for spans in (*trace.computed, *trace.waited) for span in spans)


traces = {name: min(map(Trace.of, runs), key=seconds) for name, runs in tries.items()}
titles = {}
for name, x in traces.items():
    waits = sum(span.end - span.start for spans in x.waited for span in spans) / 4 / seconds(x)
    titles[name] = f"{name}: {1e3 * seconds(x):.0f} ms; ranks wait {waits:.0%} of the time"
ranks.on_one_axis(traces, titles)

# %% [markdown]
# The arithmetic of all three is the same. In `ring` the blue is longer because MPI copies blocks
# between pieces of the attention, on the same cores and through the same memory; this is the price
# of hiding where the link is the processor itself. White is other work: merging, copying blocks
# into buffers, and times at which a rank has no core, if your machine has fewer than four.
#
# On one machine `blocking` may take as long as `lv-xattn`, or even less: the way through memory is
# so short that there is little to hide, and one message per hop costs less than two ([notebook
# 3](03_the_ring_in_one_process.ipynb), when sending early beats sending together). Between machines
# the link is slower than memory:
#
# **Predict.** On a link of 1 Gb/s, 125 million bytes per second, how long is the block of a hop on
# the way, in each of the three programs? Say that a rank computes for 20 ms per hop. Which of these
# times can be hidden, and which are?
#
# <details><summary>Reasoning</summary>
#
# `lv-xattn` and `blocking` 2 ms, with the result; `ring` 134 ms. The 2 ms can be hidden, and
# `lv-xattn` hides them; `blocking` pays them at every hop. Most of the 134 ms cannot be hidden,
# in whatever order they are sent: there is not enough work to hide them behind.
#
# </details>

# %%
on_the_way = {name: 1e3 * nbytes / (4 if name == "blocking" else 3) / 125e6
              for name, nbytes in sent.items()}  # fmt: skip
for name, ms in on_the_way.items():
    print(f"{name:9} {ms:6.1f} ms for each hop at 1 Gb/s")
assert on_the_way["lv-xattn"] < 2.2 < 134 < on_the_way["ring"]

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** Overlap hides at most as much time as there is work. First send little, then send it
# early.
#
# </div>
#
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
from lvxattn.reference import full_attention

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
print(f"the mean of the four is off by up to {abs(mean - truth_out).max():.1f}")

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
# datatype. Here is an operator of our own, which only adds:

# %% tags=["subject"]
# %%mpi 4 --take Q,K,V --give added
import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import block_attention, shard


def join(a, b, datatype):
    """Add the rows in a to those in b."""
    a, b = (np.frombuffer(x).reshape(-1, 9) for x in (a, b))
    b += a


comm = MPI.COMM_WORLD
out, lse = block_attention(Q, shard(K, comm), shard(V, comm), scale=8**-0.5)
rows = np.concatenate([out[0, 0], lse[0, 0, :, None]], axis=1)  # (6, 9)
added, row = np.empty_like(rows), MPI.DOUBLE.Create_contiguous(9).Commit()
comm.Allreduce([rows, 6, row], [added, 6, row], MPI.Op.Create(join, commute=True))

# %%
assert np.allclose(added[:, :8] / 4, mean, rtol=0, atol=1e-12)
print("our operator adds: its sum is that of allreduce, and no better as attention")

# %% [markdown]
# ### Exercise 3: write the operator
#
# `a` and `b` below are arrays of rows of any width: `a[:, :-1]` is `out`, `a[:, -1]` is `lse`.
# Leave the merged rows in `b`, as MPI will read them from there. The check runs `join` as an
# `MPI.Op` on four ranks, with scores near 0, near 2,000 and near -2,000, with levels that differ
# between rows or between ranks, and with ranks that have no keys, whose rows are 0 and `lse` is
# -inf. The formula above overflows then; [notebook 1](01_merging_softmax.ipynb) shows one that does
# not. (`from lvxattn.mpi_impl import merge` is that one.) Only this cell is sent to the ranks:
# import in it what you use.


# %% tags=["exercise"]
import numpy as np


def join(a, b):
    """Merge the rows in a into those in b."""
    raise NotImplementedError("join is not implemented")


# %% tags=["check", "hide-input"]
def rows_of(scores, values):
    """Return the rows of attention with these scores: out, and lse in the last column."""
    top = np.nan_to_num(scores.max(axis=1, initial=-np.inf, keepdims=True), neginf=0)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return np.concatenate([weights @ values / np.where(total, total, 1), lse], axis=1)


draw, cases, truths = np.random.default_rng(2), {}, {}
for name, middle, width, lengths in (
    ("scores near 0", 0, 8, (10, 10, 10, 10)), ("scores near 2,000", 2000, 3, (7, 9, 5, 8)),
    ("scores near -2,000", -2000, 5, (7, 9, 5, 8)), ("a rank without keys", 0, 4, (6, 0, 3, 2)),
    ("no keys at all", 0, 4, (0, 0, 0, 0)),
    ("scores from -2,000 to 2,000 over rows", np.linspace(-2000, 2000, 6), 3, (7, 9, 5, 8)),
    ("scores from -2,000 to 2,000 over ranks", np.c_[[0, 2000, -2000, 1000]], 5, (7, 9, 5, 8)),
):  # fmt: skip
    levels = np.broadcast_to(middle, (4, 6))[..., None]  # of each rank's rows
    scores = [level + 3 * draw.standard_normal((6, n))
              for level, n in zip(levels, lengths, strict=True)]  # fmt: skip
    values = [draw.standard_normal((n, width)) for n in lengths]
    cases[name] = [rows_of(*pair) for pair in zip(scores, values, strict=True)]
    truths[name] = rows_of(np.concatenate(scores, axis=1), np.concatenate(values))
what = "MPI merges the partial results of all ranks, whatever their scores"
with check(what), np.errstate(invalid="ignore"):
    for name, found in reductions(join, cases).items():
        off = np.where(found == truths[name], 0, np.abs(found - truths[name]))
        lse, out = off[:, -1].max(), off[:, :-1].max()
        assert lse < 1e-9, f"{name}: lse is off by {lse:.2g}"
        assert out < 1e-9, f"{name}: lse is right, out is off by {out:.2g}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The library's `merge` can be used, too; this is what it does. Everything is computed before `b` is
# written: the new `lse` must not be used as the old one.
#
# ```python
# import numpy as np
#
#
# def join(a, b):
#     top = np.maximum(a[:, -1:], b[:, -1:])
#     top = np.where(np.isfinite(top), top, 0)  # no keys on either side
#     of_a, of_b = np.exp(a[:, -1:] - top), np.exp(b[:, -1:] - top)
#     total = of_a + of_b
#     out = (of_a * a[:, :-1] + of_b * b[:, :-1]) / np.where(total, total, 1)
#     b[:, :-1], b[:, -1:] = out, top + np.log(total)
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
print("one reduction, and exact to 1e-12")

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
from lvxattn.mpi_impl.commands.demo.patches import PATCH
from lvxattn.mpi_impl.commands.demo.sources import default_video

video = default_video(frames=48, seed=0)

# %% tags=["subject"]
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
chosen = [(truth, seen, out, n) for (truth, seen, out), n in zip(found, (1, 3, 3, 2), strict=True)]
places = [np.rint(out[n]).astype(int) for _, _, out, n in chosen]
frames = [video.read(frame, frame + 1, lambda _: None)[0] for frame, _, _ in places]
seen_by_ranks = [seen[n] for _, seen, _, n in chosen]
holders = [truth.holder[n] for truth, _, _, n in chosen]
ranks.found_patches(seen_by_ranks, frames, places, holders, PATCH)

# %% [markdown]
# Every query was compared with every patch of every rank, and no key and no value was sent. The
# whole demo ([demo/search.py](../mpi_impl/commands/demo/search.py)) does the same with 360 frames
# and 256 queries, checks each answer, and accepts your own video: `make demo ARGS="--video FILE"`.
#
# <div class="alert alert-info">
#
# **Takeaways.** What an MPI program for a ring has to do:
#
# - `Sendrecv` moves blocks one place; after $P - 1$ hops every rank has had every block. A cycle of
#   ranks that wait for one another is a deadlock, which `Ssend` reveals.
# - `Irecv` and `Isend` return at once, so that a rank can compute; two buffers separate what is
#   sent from what is received.
# - Overlap hides at most as much as there is work; a timeline shows how much. Because the merge is
#   associative, MPI can use it as the operator of a reduction.
#
# </div>
#
# Files: [mpi_impl/exchange.py](../mpi_impl/exchange.py),
# [mpi_impl/collectives.py](../mpi_impl/collectives.py),
# [src/lvxattn/common/timeline.py](../src/lvxattn/common/timeline.py),
# [src/lvxattn/plan/trace.py](../src/lvxattn/plan/trace.py).
#
# Next: [notebook 5, going backward](05_going_backward.ipynb).
