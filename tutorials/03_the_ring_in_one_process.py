# %% [markdown]
# # 3. The ring in one process
#
# You will learn to follow every block of LV-XAttn round the ring, to write its forward pass with
# only *send*, *receive* and *merge*, and to compute exactly how many bytes each rank sends.
#
# Prerequisites: [notebook 1](01_merging_softmax.ipynb) for the merge, [notebook
# 2](02_why_queries_move.ipynb) for the schedules. Time: about 30 minutes.

# %%
import numpy as np
from exercise import check
from IPython.display import Image

from lvxattn.draw.film import animation, film_strip, scenes
from lvxattn.draw.rotation import COLOURS, INK, sheet
from lvxattn.plan import messages
from lvxattn.reference import (
    Layout,
    Meter,
    block_attention,
    cross_attention,
    full_attention,
    merge,
    run_ranks,
    shard,
)

# %matplotlib inline

# %% [markdown]
# ## Virtual ranks
#
# Ranks share no memory and only exchange messages. `run_ranks(P, fn, *args)` runs `fn(comm, *args)`
# on $P$ virtual ranks: threads of this process that receive copies of what is sent, so that they
# are as separate as processes. `comm.rank` is a rank's number, `comm.size` is $P$,
# `comm.send(arrays, dest)` returns at once, and `comm.recv(source)` waits.
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
# ## Cross-attention over four ranks
#
# `shard(x, comm)` returns this rank's shard of an array that every rank holds whole; the library's
# `cross_attention` takes the shards. Every rank gets the results for its own queries, over the keys
# of all ranks.

# %%
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
film_strip(logs)

# %% [markdown]
# A row is a rank, with its colour; a column is a hop. Boxes are keys and values, discs are queries.
# The small squares under a block show the ranks whose keys its result covers at the end of this
# hop.
#
# **Left, LV-XAttn.** Boxes stay, discs travel. Follow blue, $q_0$: it moves down the diagonal, one
# rank per hop. Its result travels one hop behind it, from rank 1 on: at hop 2 rank 2 attends from
# $q_0$ to its keys and merges the result with that of rank 1. In the last column each result is
# back on its owner, which merges it with the attention to its own keys.
#
# **Right, Ring Attention.** Discs stay, boxes travel. Results never leave their owner, so there is
# no last column: fewer messages, but longer ones.

# %%
q_0 = np.split(q, P, axis=2)[0]
(k_1, k_2), (v_1, v_2) = (np.split(x, P, axis=2)[1:3] for x in (k, v))
scale = D**-0.5
result = block_attention(q_0, k_1, v_1, scale=scale)  # on rank 1, at hop 1
result = merge(*result, *block_attention(q_0, k_2, v_2, scale=scale))  # on rank 2, at hop 2
both, _ = full_attention(q_0, *(np.concatenate(x, axis=2) for x in ((k_1, k_2), (v_1, v_2))))
assert np.allclose(result[0], both, rtol=0, atol=1e-13) and film[2][2] == (0, (1, 2))

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
assert len(moving) < 300_000
Image(data=moving, format="png", alt="Blocks and results going round four ranks, hop by hop")

# %% [markdown]
# The same as an animation. With LV-XAttn a rank forwards the visiting queries *before* it computes
# with them, and sends the result afterwards; so the disc moves first and the squares follow. The
# result for a rank's own queries and keys stays on that rank, and is drawn again at the end. With
# both schedules a block travels while a rank computes.
#
# ### Exercise 1: the owner of a block
#
# Which rank owns the block that is on rank `rank` after `hop` hops? The last column is hop $P$.


# %% tags=["exercise"]
def owner(rank, hop, P):
    """Return the rank that owns the block."""
    raise NotImplementedError("owner is not implemented")


# %% tags=["check"]
with check("the owner of every block at every hop"):
    for at_hop, by_rank in enumerate(film):
        for at_rank, scene in enumerate(by_rank):
            got = owner(at_rank, at_hop, P)
            says = f"rank {at_rank} at hop {at_hop}"
            assert got == scene.owner, f"{says}: expected owner {scene.owner}, got {got}"

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
# takes $P$ hops. Ten lines are enough.


# %% tags=["exercise"]
def ring_by_hand(comm, q, k, v, scale):
    """Attend from this rank's queries to the keys of all ranks; return (out, lse)."""
    raise NotImplementedError("ring_by_hand is not implemented")


# %% tags=["check"]
with check("the forward on any number of ranks, which send only queries and results"):
    want, want_lse = full_attention(q, k, v)
    for ranks in (1, 2, 3, 5):
        log = []
        found = run_ranks(
            ranks, lambda comm: ring_by_hand(comm, *(shard(x, comm) for x in (q, k, v)), D**-0.5),
            log=log,
        )  # fmt: skip
        for rank, (out, lse) in enumerate(found):
            mine = [np.array_split(x, ranks, axis=2)[rank] for x in (want, want_lse)]
            who = f"rank {rank} of {ranks}"
            for name, x, y in zip(("out", "lse"), (out, lse), mine, strict=True):
                assert x.shape == y.shape, f"{who}, {name}: expected {y.shape}, got {x.shape}"
                off = np.abs(x - y).max()
                assert off < 1e-13, f"{who}, {name}: expected it to 1e-13, got an error {off:.0e}"
        block = B * H * -(-S_Q // ranks) * (2 * D + 1) * 8
        most = max((message.nbytes for message in log), default=0)
        assert most <= block, f"{ranks} ranks: expected at most {block} bytes at once, got {most}"
        to = {message.dest - message.source for message in log} - {1, 1 - ranks}
        assert not to, f"{ranks} ranks: expected messages to the right only, got steps of {to}"

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
# Nothing overlaps here: a block cannot leave before the computation with it is done. The library's
# [lv_xattn.py](../reference/lv_xattn.py) forwards queries first and sends results after them. It
# also takes one hop fewer for both: queries need not return to their owner, and the owner's own
# part of the result is never sent.
#
# </details>

# %% [markdown]
# ## Bytes of every message
#
# A `Meter` counts what its rank sends; the log lists single messages. The plan of notebook 2
# predicts both. In fp64 all numbers have 8 bytes.
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

# %% tags=["hide-input"]
figure, axes = sheet(2.8)
for (schedule, sent), colour in zip(of_a_rank.items(), COLOURS, strict=False):
    y = [nbytes / 1000 for nbytes in sent]
    axes.plot(numbers, y, "o-", color=colour, lw=2)
    axes.text(numbers[-1], y[-1], f"  {schedule}", va="center", color=INK, size=11)
axes.set(xlabel="ranks", ylabel="kilobytes sent by a rank", xticks=numbers)
figure

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
# In the forward, in fp64, rank `rank` sends $P - 1$ blocks of queries and $P - 1$ results. Return
# the bytes of each message in the order of the hops, as one list for blocks and one for results.


# %% tags=["exercise"]
def sizes_by_hand(rank, s_q, H, D, D_V):
    """Return the sizes of the query blocks and of the results that a rank sends, as two lists."""
    raise NotImplementedError("sizes_by_hand is not implemented")


# %% tags=["check"]
with check("the size of every message, with shards of any length"):
    narrow = [*uneven[:2], [x[..., :5] for x in uneven[2]]]  # D_V is not D
    for layout in run_ranks(3, lambda comm: Layout.agree(*(x[comm.rank] for x in narrow), comm)):
        found = sizes_by_hand(layout.rank, layout.s_q, H, D, D_V=5)
        for kind, got in zip(("blocks", "results"), found, strict=True):
            sizes = [m.nbytes for m in messages(layout, layout.rank) if m.kind == kind]
            assert got == sizes, f"rank {layout.rank}, {kind}: expected {sizes}, got {got}"

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
film_strip({"lv-xattn": dealt})

# %% [markdown]
# The rows are in the order of the ranks' numbers, so blocks do not move along diagonals; every
# block still visits every rank once, and every result ends on its owner.
#
# ## Summary
#
# - With LV-XAttn keys, values and masks stay; queries make $P - 1$ hops, and so do results, one hop
#   behind them.
# - The algorithm is ten lines of send, receive and merge. Shards may be uneven or empty.
# - The bytes that each rank sends follow from the shapes alone. For any $P$ they are less than all
#   queries and all results once.
#
# Files: [reference/virtual_ranks.py](../reference/virtual_ranks.py),
# [exchange.py](../reference/exchange.py), [lv_xattn.py](../reference/lv_xattn.py),
# [ring_attention.py](../reference/ring_attention.py), [layout.py](../src/lvxattn/common/layout.py).
#
# Next: [notebook 4, real ranks with MPI](04_real_ranks_with_mpi.ipynb).
