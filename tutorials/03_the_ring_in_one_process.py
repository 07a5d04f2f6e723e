# %% [markdown]
# # 3. The ring in one process
#
# A mistake in a program for many processes often has no error message: it hangs, or it returns
# numbers that look right. In one process every message can be listed, every result compared with
# attention computed at once, and a deadlock is an exception. Here the whole forward of LV-XAttn,
# twenty lines, is written and tested on any number of ranks, without a cluster.
#
# **You will be able to**
#
# - follow every block round the ring, and say whose keys its result covers at each hop,
# - write the forward with *send*, *receive* and *merge*, and say when sending early saves time,
# - compute the bytes of every message from the shapes, also of uneven and empty shards.
#
# **Prerequisites.** [Notebook 1](01_merging_softmax.ipynb) for the merge, [notebook
# 2](02_why_queries_move.ipynb) for the schedules.
#
# **Time.** About 45 minutes, with three exercises.

# %%
import numpy as np
from exercise import check
from exercise_ranks import on_virtual_ranks
from figures import ring
from IPython.display import Image

from lvxattn.draw.film import animation, film_strip, scenes
from lvxattn.plan import messages
from lvxattn.reference import run_ranks

# %matplotlib inline

# %% [markdown]
# ## Virtual ranks
#
# Ranks share no memory and only exchange messages. `run_ranks(P, fn, *args)` runs `fn(comm, *args)`
# on $P$ virtual ranks: threads of this process that receive copies of what is sent, so that they
# are as separate as processes. `comm.rank` is a rank's number, `comm.size` is $P$,
# `comm.send(arrays, dest)` returns at once, and `comm.recv(source)` waits. `shard(x, comm)` is this
# rank's shard of an array that every rank holds whole.
#
# **Predict.** Each of four ranks sends its number to the right, that is, to rank $(r + 1) \bmod 4$,
# and returns the number that it receives from the left. What is the list of results?
#
# <details><summary>Reasoning</summary>
#
# Each rank receives its left neighbour's number: 3, 0, 1, 2.
#
# </details>


# %%
def pass_to_the_right(comm):
    comm.send([np.array(comm.rank)], (comm.rank + 1) % comm.size)
    (number,) = comm.recv((comm.rank - 1) % comm.size)
    return int(number)


print(run_ranks(4, pass_to_the_right))
assert run_ranks(4, pass_to_the_right) == [3, 0, 1, 2]


# %% [markdown]
# This is a *hop*: every rank sends its block to the right and receives one from the left. After $h$
# hops a block is $h$ places to the right of its owner.
#
# **Predict.** Swap the two lines: first receive, then send. What happens?
#
# <details><summary>Reasoning</summary>
#
# Each rank waits for a message that its left neighbour sends only after receiving one: a deadlock.
# Virtual ranks detect it; real ranks hang.
#
# </details>


# %%
def wait_before_sending(comm):
    (number,) = comm.recv((comm.rank - 1) % comm.size)
    comm.send([number], (comm.rank + 1) % comm.size)


try:
    said = run_ranks(2, wait_before_sending)
except RuntimeError as error:
    said = str(error)
print(said.replace(", ", ",\n"))
assert said.startswith("deadlock")

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** In a hop every rank sends to the right *before* it receives from the left. If all
# receive first, none ever sends.
#
# </div>
#
# ## Cross-attention over four ranks
#
# The library's `cross_attention` takes this rank's shards of queries, keys and values. Every rank
# gets the results for its own queries, over the keys of all ranks.

# %%
from lvxattn.reference import Meter, cross_attention, full_attention, shard

P, B, H, H_KV, S_Q, S_KV, D = 4, 1, 2, 1, 16, 400, 8
rng = np.random.default_rng(0)
q = rng.standard_normal((B, H, S_Q, D))
k, v = rng.standard_normal((2, B, H_KV, S_KV, D))


def forward(comm, schedule):
    meter, parts = Meter(), [shard(x, comm) for x in (q, k, v)]
    out, lse = cross_attention(*parts, comm, schedule=schedule, meter=meter)
    return out, lse, meter


# %% tags=["varies"]
logs = {schedule: [] for schedule in ("lv-xattn", "ring")}
want, _ = full_attention(q, k, v)  # unsharded
for schedule, log in logs.items():
    results = run_ranks(P, forward, schedule, log=log)
    out = np.concatenate([out for out, _, _ in results], axis=2)
    print(f"{schedule:9} largest error {np.abs(out - want).max():.0e}, {len(log)} messages")
    assert np.allclose(out, want, rtol=0, atol=1e-13)

# %% [markdown]
# Both are exact up to rounding in fp64. `log` contains every message that was sent, in order.
#
# ## Every hop in a picture
#
# **Predict.** With LV-XAttn on four ranks, whose queries does rank 0 compute with at hop 1, and
# where are its own queries then?
#
# <details><summary>Reasoning</summary>
#
# Blocks move to the right: rank 3's queries are on rank 0, and rank 0's on rank 1.
#
# </details>

# %%
film = scenes("lv-xattn", logs["lv-xattn"])  # film[hop][rank], reconstructed from the log
assert film[1][0].owner == 3 and film[1][1].owner == 0
print(f"at hop 1 rank 0 has the queries of rank {film[1][0].owner}; its own are on rank 1")
film_strip(logs)

# %% [markdown]
# A row is a rank, with its colour; a column is a hop. Boxes are keys and values, discs are queries.
# The small squares under a block show the ranks whose keys its result covers at the end of this
# hop.
#
# **Left, LV-XAttn.** Boxes stay, discs travel. Follow blue, $q_0$: it moves down the diagonal, one
# rank per hop. Its result starts one hop later, from rank 1, and arrives in the same hop, after the
# queries: at hop 2 rank 2 attends from $q_0$ to its keys, and merges the result with that of rank
# 1, which has come meanwhile. In the last column each result is back on its owner, which merges it
# with the attention to its own keys.
#
# **Right, Ring Attention.** Discs stay, boxes travel. Results never leave their owner, so there is
# no last column: fewer messages, but longer ones.

# %%
from lvxattn.reference import block_attention, merge

q_0 = np.split(q, P, axis=2)[0]
(k_1, k_2), (v_1, v_2) = (np.split(x, P, axis=2)[1:3] for x in (k, v))
scale = D**-0.5
result = block_attention(q_0, k_1, v_1, scale=scale)  # on rank 1, at hop 1
result = merge(*result, *block_attention(q_0, k_2, v_2, scale=scale))  # on rank 2, at hop 2
both, _ = full_attention(q_0, *(np.concatenate(x, axis=2) for x in ((k_1, k_2), (v_1, v_2))))
assert np.allclose(result[0], both, rtol=0, atol=1e-13) and film[2][2] == (0, (1, 2))
print("q_0 at hop 2: its result is the attention to the keys of ranks 1 and 2, to 1e-13")

# %% [markdown]
# This is what the squares under $q_0$ show at hop 2: the result is exactly the attention over the
# keys of ranks 1 and 2.
#
# **Predict.** How many messages are there in each picture, and which ranks' keys does each result
# cover at the end?
#
# <details><summary>Reasoning</summary>
#
# Every rank sends 3 blocks, and with LV-XAttn also 3 results: 4 · 6 = 24 and 4 · 3 = 12. Each
# result covers all ranks' keys, each once.
#
# </details>

# %%
for schedule, log in logs.items():
    last = scenes(schedule, log)[-1]
    print(f"{schedule:9} {len(log):2} messages; at the end results cover", last[0].joined)
    assert all(sorted(scene.joined) == [0, 1, 2, 3] for scene in last)
assert len(logs["lv-xattn"]) == 2 * P * (P - 1) == 2 * len(logs["ring"])
assert max(m.nbytes for m in logs["lv-xattn"]) < min(m.nbytes for m in logs["ring"])

# %%
moving = animation(logs)
Image(data=moving, format="png", alt="Blocks and results going round four ranks, hop by hop")

# %% [markdown]
# The same as an animation, which counts its steps: blocks move in one, results in the next. With
# LV-XAttn a rank forwards the visiting queries *before* it computes with them, and sends the result
# afterwards; so the disc moves first and the squares follow. The result for a rank's own queries
# and keys stays on that rank, and is drawn again at the end. With both schedules a block travels
# while a rank computes.
#
# ### Exercise 1: the owner of a block
#
# Which of $P$ ranks owns the block that is on rank `rank` after `hop` hops? The last column is hop
# $P$. The check tries 2, 3, 4 and 5 ranks.


# %% tags=["exercise"]
def owner(rank, hop, P):
    """Return the rank that owns the block."""
    raise NotImplementedError("owner is not implemented")


# %% tags=["check", "hide-input"]
def owners_by_messages():
    """Return, by P, the owner at every hop on every rank, from the messages that were sent."""
    passed = {}
    for count in (4, 2, 3, 5):
        run_ranks(count, forward, "lv-xattn", log=(sent := []))
        passed[count] = [[at.owner for at in column] for column in scenes("lv-xattn", sent)]
    return passed


def owner_of_every_block(passed):
    for count, columns in passed.items():
        for at_hop, column in enumerate(columns):
            for at_rank, expected in enumerate(column):
                got = owner(at_rank, at_hop, count)
                says = f"{count} ranks, rank {at_rank} at hop {at_hop}"
                assert got == expected, f"{says}: expected owner {expected}, got {got}"


with check("the owner of every block at every hop, on 2 to 5 ranks", hide="film logs P"):
    owner_of_every_block(owners_by_messages())

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def owner(rank, hop, P):
#     return (rank - hop) % P
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: the forward pass
#
# Write LV-XAttn's forward with `comm.send`, `comm.recv`, `block_attention` and `merge`.
# `block_attention(q, k, v, scale=scale)` attends from some queries to some keys and returns `(out,
# lse)`; `merge(out_a, lse_a, out_b, lse_b)` joins results over different keys ([notebook
# 1](01_merging_softmax.ipynb)). The simplest solution sends a block and its result together, and
# takes $P$ hops. Ten lines are enough. The check uses 1 to 5 ranks, shapes and a scale of its own,
# $D_V \ne D$, and counts the messages and bytes of every rank.


# %% tags=["exercise"]
def ring_by_hand(comm, q, k, v, scale):
    """Attend from this rank's queries to the keys of all ranks; return (out, lse).

    q is (B, H, s_q, D), k (B, H_KV, s_kv, D), v (B, H_KV, s_kv, D_V): shards of this rank.
    """
    raise NotImplementedError("ring_by_hand is not implemented")


# %% tags=["check", "hide-input"]
def forward_on_ranks():
    from lvxattn.reference import full_attention as over_all

    draw, cases = np.random.default_rng(1), []
    for count, d, d_v, rows, keys in (
        (2, 8, 8, 6, 30), (3, 6, 4, 7, 40), (1, 4, 7, 3, 9), (5, 4, 7, 7, 23), (4, 8, 3, 9, 2)
    ):  # fmt: skip
        whole = [draw.standard_normal((2, *shape))
                 for shape in ((4, rows, d), (2, keys, d), (2, keys, d_v))]  # fmt: skip
        factor = draw.uniform(0.2, 0.9)
        truths = [np.array_split(x, count, axis=2) for x in over_all(*whole, scale=factor)]
        cases.append((d, d_v, [np.array_split(x, count, axis=2) for x in whole], factor, truths))
    for d, d_v, parts, factor, truths in cases:
        count, lengths = len(parts[0]), [2 * 4 * x.shape[2] * 8 for x in parts[0]]
        where = f"{count} rank{'s' * (count > 1)}, D = {d}, D_V = {d_v}"
        found, sent = on_virtual_ranks(
            count,
            lambda comm, parts=parts, factor=factor: ring_by_hand(
                comm, *(x[comm.rank] for x in parts), factor
            ),
            most=4 * count,
            where=where,
        )
        for rank, result in enumerate(found):
            mine, right = [m for m in sent if m.source == rank], (rank + 1) % count
            steps = {(m.dest - rank) % count for m in mine} - {1 % count}
            assert not steps, f"{where}: rank {rank} sent {steps} places to the right, expected 1"
            largest, block = max((m.nbytes for m in mine), default=0), max(lengths) * (d + d_v + 2)
            assert largest <= block, (
                f"{where}: rank {rank} sent {largest:,} bytes at once; a block of queries and its "
                f"result have at most {block:,}"
            )
            total, most = sum(m.nbytes for m in mine), sum(lengths) * (d + d_v + 2)
            least = (sum(lengths) - lengths[right]) * d + (sum(lengths) - lengths[rank]) * (d_v + 1)
            told = f"{where}: rank {rank} sent {total:,} bytes in {len(mine)} messages, expected"
            assert total >= least or count == 1, (
                f"{told} at least {least:,}: the queries and the results of {count - 1} ranks"
            )
            assert total <= most, f"{told} at most {most:,}: each block and its result once"
            pair = isinstance(result, tuple | list) and len(result) == 2
            assert pair, f"{where}: expected (out, lse), got {type(result).__name__}"
            for name, x, y in zip(("out", "lse"), result, truths, strict=True):
                who, y_mine = f"{where}: {name} of rank {rank}", y[rank]
                shape = np.shape(x)
                assert shape == y_mine.shape, f"{who}: expected shape {y_mine.shape}, got {shape}"
                off = np.abs(x - y_mine).max(initial=0)
                assert off < 1e-12, f"{who}: expected an error below 1e-12, got {off:.0e}"


with check(
    "the forward on 1 to 5 ranks, which send each block of queries and its result once",
    hide="q k v P scale want out results log logs cross_attention full_attention shard forward",
):
    forward_on_ranks()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def ring_by_hand(comm, q, k, v, scale):
#     right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
#     q_block = q
#     out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)  # no keys yet
#     for _ in range(comm.size):
#         out, lse = merge(out, lse, *block_attention(q_block, k, v, scale=scale))
#         comm.send([q_block, out, lse], right)
#         q_block, out, lse = comm.recv(left)
#     return out, lse
# ```
#
# Nothing overlaps here: a block leaves only when the computation with it is done.
#
# </details>

# %% [markdown]
# ## The algorithm, whole
#
# The simple solution can be improved in three ways:
#
# - **Queries leave early.** The queries of a block do not change, so a rank passes them on *before*
#   it attends from them. Only the result has to wait for the computation. Queries and results are
#   then separate messages.
# - **One hop fewer.** Queries need not return to their owner, and the part of a result that its
#   owner computes need not be sent: $P - 1$ hops for each.
# - **Own keys in two halves.** The first hop of queries and the last hop of results also need work
#   that hides them. A rank attends from its own queries to half of its keys at the beginning, and
#   to the other half at the end.
#
# This is all of LV-XAttn's forward (arXiv:2502.02406, algorithm 1; the order of the hops and the
# two halves are this implementation's):


# %% tags=["subject"]
def lv_xattn(comm, q, k, v, scale):
    """Attend from this rank's queries to the keys of all ranks; return (out, lse)."""
    P, right, left = comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    half = k.shape[2] // 2 if P > 1 else k.shape[2]

    # 1. Send my queries on; attention to half of my keys hides the transfer.
    if P > 1:
        comm.send([q], right)
    result = block_attention(q, k[:, :, :half], v[:, :, :half], scale=scale)

    for hop in range(1, P):
        # 2. Receive visiting queries, and pass them on before computing with them.
        (q_block,) = comm.recv(left)
        if hop < P - 1:
            comm.send([q_block], right)
        # 3. Attend from them to all of my keys.
        partial = block_attention(q_block, k, v, scale=scale)
        # 4. Merge with what the ranks before have computed, and send it after the queries.
        if hop > 1:
            partial = merge(*partial, *comm.recv(left))
        comm.send(partial, right)

    if P > 1:
        # 5. Attend to the other half of my keys while the result for my queries comes home.
        rest = block_attention(q, k[:, :, half:], v[:, :, half:], scale=scale)
        # 6. Merge everything.
        result = merge(*merge(*result, *rest), *comm.recv(left))
    return result


# %%
for count in range(1, 8):
    log = []
    found = run_ranks(
        count, lambda comm: lv_xattn(comm, *(shard(x, comm) for x in (q, k, v)), scale), log=log
    )
    assert np.allclose(np.concatenate([out for out, _ in found], axis=2), want, rtol=0, atol=1e-13)
    assert len(log) == 2 * count * (count - 1)
    print(f"P = {count}: exact to 1e-13, each rank sent {2 * (count - 1)} messages")

# %% [markdown]
# The library's [lv_xattn.py](../reference/lv_xattn.py) has the same six steps, and the backward
# beside them ([notebook 5](05_going_backward.ipynb)).
#
# <div class="alert alert-info">
#
# **Takeaway.** The forward is send, receive, attend and merge. Queries leave before the work on
# them, results after it; $P - 1$ hops are enough for both.
#
# </div>
#
# ## When sending early beats sending together
#
# Let the attention from one block to a rank's keys take the time 1, and a block of queries, or its
# result, the time `transfer` on a link. All ranks do the same at the same time, so one shows all.
# The folded cell computes when a rank works and when its link is busy, with both programs: `early`
# is `lv_xattn`, the other is the simple solution of exercise 2. Each message also takes the time
# `start` of the rank itself, which cannot work meanwhile.
#
# **Predict.** `start` is 0. With four ranks, the transfer of a block and its result takes as long
# as the attention, `2 * transfer == 1`. How long does each program take?
#
# <details><summary>Reasoning</summary>
#
# Together: in each of four hops the rank works for 1, and then waits for 1 until the next block is
# here: 8. Early: 3 blocks and 3 results are on the link for 3, while the rank works for 4: work of
# 4 and nothing else. Half of the time.
#
# </details>


# %% tags=["hide-input"]
def one_pass(P, transfer, early, start=0.0):
    """Return the spans of a rank's work, those of its link, and when it is done."""
    now, result, working, sending = 0.0, 0.0, [], []

    def attend(seconds):
        nonlocal now
        working.append((now, now + seconds))
        now += seconds

    def send(seconds):
        """Put a message behind the others of this rank; return when it arrives."""
        nonlocal now
        now += start
        begin = max([now, *(end for _, end in sending[-1:])])
        sending.append((begin, begin + seconds))
        return begin + seconds

    if not early:
        for _ in range(P):
            attend(1)
            now = send(2 * transfer)
        return working, sending, now
    block = send(transfer)
    attend(0.5)
    for hop in range(1, P):
        now = max(now, block)
        if hop < P - 1:
            block = send(transfer)
        attend(1)
        now = max(now, result)
        result = send(transfer)
    attend(0.5)
    return working, sending, max(now, result)


# %%
names = {"sent together, after the work": False, "queries sent early": True}
passes = {name: one_pass(4, transfer=0.5, early=early) for name, early in names.items()}
print([done for _, _, done in passes.values()])
assert [done for _, _, done in passes.values()] == [8, 4]
ring.two_passes(passes)

# %% [markdown]
# **Predict.** On eight ranks, for which ratio of the time of transfer to the time of work is the
# gain from sending early largest? What is it if a transfer is very short, or very long? And can
# early be slower?
#
# <details><summary>Reasoning</summary>
#
# Early hides the shorter of the two behind the longer one. If a transfer is short there is little
# to hide: with a ratio of 0.1, sending together takes 1.1 times as long. If it is long there is
# little to hide it behind, and what remains is the hop that is saved, 8 / 7 on eight ranks. The
# largest gain is where both are equal: a factor of 2. Sending early takes two messages per hop in
# place of one; where starting a message costs more than is hidden, it is slower.
#
# </details>

# %%
ratios = [float(x) for x in np.logspace(-2, 2, 81)]
curves = {
    f"{cost:g} to start a message": [
        one_pass(8, x / 2, False, cost)[2] / one_pass(8, x / 2, True, cost)[2] for x in ratios
    ]
    for cost in (0.0, 0.3)
}
free, costly = curves.values()
assert max(free) == free[40] == 2 and min(free) > 1 and costly[0] < 1
print(f"at equal times {free[40]:g}; transfer 1/10 of the work {free[20]:.2f}, "
      f"10 times {free[60]:.2f}")  # fmt: skip
ring.gain(ratios, curves)

# %% [markdown]
# So sending early gains most where work and transfer take about equally long. Where is that? Work
# grows with a rank's keys, and the transfer does not. For a row of queries of one head a rank
# computes $4\,s_{KV} D$ operations, and $2D + 4(D + 2) \approx 6D$ bytes travel in bfloat16: a
# result has fp32, and its lse travels as two numbers, the maximum and the sum of the softmax. On a
# GPU at 200 Tflop/s behind a link of 25 GB/s both take equally long at
#
# $$s_{KV} = \frac{6}{4} \cdot \frac{2 \cdot 10^{14}}{2.5 \cdot 10^{10}} = 12{,}000$$
#
# keys on each rank. At 1.2 million keys a rank, the transfer is 1 % of the work, and nearly any
# order is good; at 12,000, sending early takes half of the time. Messages that are too small to be
# worth their start are the exception: a few queries on few keys.

# %% [markdown]
# ## Bytes of every message
#
# A `Meter` counts what its rank sends; the log lists single messages. The plan of notebook 2
# predicts both. In fp64 all numbers have 8 bytes.
#
# lse travels as two numbers, the softmax's maximum and its sum, which keep what their log would
# round.
#
# **Predict.** `q` is (1, 2, 16, 8), on 4 ranks. How many bytes are a block of queries and a partial
# result, and how many does a rank send with `lv-xattn`?
#
# <details><summary>Reasoning</summary>
#
# Queries: 2 heads · 4 rows · 8 numbers · 8 bytes = 512. Result: 512 for out, and 2 · 4 · 2 · 8 =
# 128 for lse, a pair on the wire: 640. Three of each: 3,456.
#
# </details>


# %%
from lvxattn.reference import Layout


def agreed(comm, schedule):
    return Layout.agree(*(shard(x, comm) for x in (q, k, v)), comm, schedule=schedule)


layout = run_ranks(P, agreed, "lv-xattn")[0]
print(", ".join(f"{message.kind} {message.nbytes}" for message in messages(layout, rank=0)))
assert sum(message.nbytes for message in messages(layout, rank=0)) == 3 * (512 + 640) == 3456

# %%
for schedule, log in logs.items():
    layout = run_ranks(P, agreed, schedule)[0]
    meters = [meter for _, _, meter in run_ranks(P, forward, schedule)]
    for rank, meter in enumerate(meters):
        foreseen = [(message.dest, message.nbytes) for message in messages(layout, rank)]
        assert foreseen == [(m.dest, m.nbytes) for m in log if m.source == rank]
        assert meter.messages == len(foreseen) and meter.bytes == sum(n for _, n in foreseen)
    print(f"{schedule:9} each rank sends {meters[0].messages} messages, {meters[0].bytes:6,} bytes")

# %% [markdown]
# The plan predicts every message: its position, receiver and length. In the list of `lv-xattn`
# queries are sent early, and each result after it is computed.
#
# **Predict.** To hide the first hop of the queries and the last hop of the results, a rank splits
# the attention from its own queries to its own keys in two. How many of its 100 keys would you use
# first, and how many last?
#
# <details><summary>Reasoning</summary>
#
# Both hops have about the same number of bytes here, and each gets half: 50 and 50. In fp16 a
# result has twice the bytes of its queries, but the split stays: forward and backward then round
# scores in the same way.
#
# </details>

# %%
for layout in run_ranks(P, agreed, "lv-xattn"):
    assert layout.s_kv[layout.rank] == 100 and layout.home_cut == 50
print(f"each rank attends to {layout.home_cut} of its {layout.s_kv[layout.rank]} keys first")

# %% [markdown]
# **Predict.** With fixed lengths and growing $P$, how do the bytes grow that one rank sends, and
# those that all ranks send together?
#
# <details><summary>Reasoning</summary>
#
# P - 1 blocks of S_Q / P rows: a rank sends almost S_Q rows for any P, and all ranks together P - 1
# times S_Q.
#
# </details>

# %%
numbers, of_a_rank = [1, 2, 4, 8, 16], {"lv-xattn": [], "ring": []}
rows_of_all = {"lv-xattn": H * S_Q * (D + D + 2), "ring": H_KV * S_KV * (D + D)}
for schedule, sent in of_a_rank.items():
    for n in numbers:
        by_rank = [meter.bytes for _, _, meter in run_ranks(n, forward, schedule)]
        assert sum(by_rank) == (n - 1) * 8 * rows_of_all[schedule]
        assert by_rank[0] < 8 * rows_of_all[schedule]
        sent.append(by_rank[0])
    print(f"{schedule:9} all ranks together: P - 1 times {8 * rows_of_all[schedule]:,} bytes")
ring.bytes_by_ranks(numbers, of_a_rank)

# %% [markdown]
# More ranks divide the work, but not the bytes: what each rank sends approaches, but never reaches,
# all rows once.
#
# ## Uneven and empty shards
#
# Nothing above requires equal shards. If $P$ does not divide a length, `shard` makes the first
# shards longer by one. A rank may also hold a shard of any length, or an empty one.
#
# **Predict.** Three ranks hold 5, 0 and 11 queries, and 0, 150 and 250 keys. Is the result still
# exact? What is the partial result over no keys?
#
# <details><summary>Reasoning</summary>
#
# Yes. Over no keys it is (0, -inf), the identity of the merge.
#
# </details>

# %%
q_cuts, kv_cuts = [5, 5], [0, 150]  # where the next rank's shard begins
uneven = [np.split(q, q_cuts, axis=2), *(np.split(x, kv_cuts, axis=2) for x in (k, v))]


def on_uneven(comm, schedule):
    return cross_attention(*(shares[comm.rank] for shares in uneven), comm, schedule=schedule)


# %%
for schedule in ("lv-xattn", "ring"):
    log = []
    found = run_ranks(3, on_uneven, schedule, log=log)
    print(schedule, [out.shape for out, _ in found], [m.nbytes for m in log if m.source == 0])
    assert np.allclose(np.concatenate([out for out, _ in found], axis=2), want, rtol=0, atol=1e-13)
assert run_ranks(7, agreed, "lv-xattn")[0].s_q == (3, 3, 2, 2, 2, 2, 2)  # 16 over 7 ranks

# %% [markdown]
# Empty blocks are sent like others, so that every rank knows how many messages to expect. Before
# the first block, `Layout.agree` has exchanged all lengths.
#
# ### Exercise 3: bytes of uneven shards
#
# In the forward, with $B = 1$ and in fp64, rank `rank` sends $P - 1$ blocks of queries and $P - 1$
# results. Return the bytes of each message in the order of the hops, as one list for blocks and one
# for results.


# %% tags=["exercise"]
def sizes_by_hand(rank, s_q, H, D, D_V):
    """Return the sizes of the query blocks and of the results that a rank sends, as two lists."""
    raise NotImplementedError("sizes_by_hand is not implemented")


# %% tags=["check", "hide-input"]
def sizes_by_plan():
    """Return shards, and the sizes that the plan has for each rank."""
    cases = []
    for heads, d, d_v, lengths in (
        (2, 8, 5, (5, 0, 11)), (3, 4, 6, (2, 3, 1, 7, 4)), (1, 5, 5, (4, 9)), (4, 2, 3, (6,))
    ):  # fmt: skip
        parts = [[np.zeros((1, heads, n, width)) for n in lengths] for width in (d, d, d_v)]
        for layout in run_ranks(
            len(lengths), lambda comm, on=parts: Layout.agree(*(x[comm.rank] for x in on), comm)
        ):
            planned = messages(layout, layout.rank)
            sizes = [
                [m.nbytes for m in planned if m.kind == kind] for kind in ("blocks", "results")
            ]
            cases.append((layout.rank, lengths, heads, d, d_v, sizes))
    return cases


def sizes_of_messages(cases=sizes_by_plan()):  # noqa: B008 - before names are hidden
    for rank, lengths, heads, d, d_v, sizes in cases:
        found = sizes_by_hand(rank, lengths, heads, d, d_v)
        where = f"s_q = {lengths}, H = {heads}, D = {d}, D_V = {d_v}: rank {rank}"
        assert len(found) == 2, f"{where}: expected two lists, got {found}"
        for kind, got, expected in zip(("blocks", "results"), found, sizes, strict=True):
            assert list(got) == expected, f"{where}, {kind}: expected {expected}, got {got}"


with check(
    "the size of every message, with shards of any length, on 1 to 5 ranks",
    hide="messages layout agreed uneven logs log P",
):
    sizes_of_messages()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def sizes_by_hand(rank, s_q, H, D, D_V):
#     P = len(s_q)
#     visitor = [s_q[(rank - hop) % P] for hop in range(P)]  # length of the block, by hop
#     blocks = [H * n * D * 8 for n in visitor[:-1]]  # own block first; the last is not forwarded
#     results = [H * n * (D_V + 2) * 8 for n in visitor[1:]]  # of all blocks but its own
#     return blocks, results
# ```
#
# </details>

# %% [markdown]
# ## Masks do not travel
#
# A mask determines which query may attend to which key. Each rank is given the columns of *its own
# keys*. With LV-XAttn every query visits these keys, so the mask is used where it is. With Ring
# Attention keys travel, and their columns of the mask with them.
#
# **Predict.** The mask is (1, 1, 16, 400), one byte per element. How many more bytes do all ranks
# together send, with each schedule?
#
# <details><summary>Reasoning</summary>
#
# LV-XAttn: none. Ring: each column travels P - 1 = 3 hops with its key: 3 · 6,400 = 19,200 bytes.
#
# </details>

# %%
seen = rng.random((1, 1, S_Q, S_KV)) < 0.5
masked_want, _ = full_attention(q, k, v, mask=seen)


def masked(comm, schedule):
    parts, mask = [shard(x, comm) for x in (q, k, v)], shard(seen, comm, axis=3)
    return cross_attention(*parts, comm, schedule=schedule, mask=mask)[0]


# %%
for schedule, more in (("lv-xattn", 0), ("ring", 19_200)):
    log = []
    out = np.concatenate(run_ranks(P, masked, schedule, log=log), axis=2)
    extra = sum(m.nbytes for m in log) - sum(m.nbytes for m in logs[schedule])
    print(f"{schedule:9} {extra:6,} bytes more with a mask")
    assert extra == more and np.allclose(out, masked_want, rtol=0, atol=1e-13)

# %% [markdown]
# ## The order of the ring
#
# Links inside a host are faster than links between hosts. `Layout.agree` orders the ring so that it
# crosses between hosts as rarely as possible, regardless of the ranks' numbers.
#
# **Predict.** Ranks 0 and 2 are on host a, 1 and 3 on host b. In which order does the ring visit
# them, and how many of its four hops cross?
#
# <details><summary>Reasoning</summary>
#
# 0, 2, 1, 3: two cross, from 2 to 1 and from 3 back to 0. In the order of the ranks' numbers all
# four would.
#
# </details>

# %%
hosts = ["a", "b", "a", "b"]
order = run_ranks(P, agreed, "lv-xattn", hosts=hosts)[0].order
crossing = sum(hosts[order[n]] != hosts[order[n - 1]] for n in range(P))
print(f"the ring visits {order}; {crossing} of {P} links cross between hosts")
assert order == (0, 2, 1, 3) and crossing == 2

# %%
dealt = []
run_ranks(P, forward, "lv-xattn", log=dealt, hosts=hosts)
hops = [[scene.owner for scene in column] for column in scenes("lv-xattn", dealt)]
assert hops[1] == [3, 2, 0, 1] and hops[0] == hops[P] == [0, 1, 2, 3]
assert all(sorted(at_a_rank) == [0, 1, 2, 3] for at_a_rank in zip(*hops[:P], strict=True))
print("hop 1, ranks 0 to 3: the queries of", *hops[1])
film_strip({"lv-xattn": dealt})

# %% [markdown]
# The rows are in the order of the ranks' numbers, so blocks do not move along diagonals; every
# block still visits every rank once, and every result ends on its owner.
#
# <div class="alert alert-info">
#
# **Takeaways.** For any number of ranks:
#
# - With LV-XAttn keys, values and masks stay; queries make $P - 1$ hops, and so do results, one hop
#   behind them. The algorithm is twenty lines of send, receive, attend and merge.
# - Sending queries before the work on them saves up to half of the time, most where work and
#   transfer take equally long.
# - The bytes that each rank sends follow from the shapes alone, also for uneven and empty shards.
#   For any $P$ they are at most all queries and all results once.
#
# </div>
#
# Files: [reference/virtual_ranks.py](../reference/virtual_ranks.py),
# [exchange.py](../reference/exchange.py), [lv_xattn.py](../reference/lv_xattn.py),
# [ring_attention.py](../reference/ring_attention.py), [layout.py](../src/lvxattn/common/layout.py).
#
# Next: [notebook 4, real ranks with MPI](04_real_ranks_with_mpi.ipynb).
