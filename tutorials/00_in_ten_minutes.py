# %% [markdown]
# # 0. In ten minutes
#
# A model that watches 20 minutes of video keeps 234 GiB of keys and values for its cross-attention,
# and a GPU has 80 GB. So they are divided among GPUs, and every query of the text has to meet all
# of them. With Ring Attention, which passes keys and values round, each of four GPUs sends 23.6 GB
# in the forward of every layer. With LV-XAttn, which passes queries round, it sends 38 MB: 619
# times less, for the same result.
#
# **You will be able to**
#
# - say what travels, what stays, and why the result is exact;
# - read LV-XAttn whole, in forty lines of NumPy, and run it on four ranks;
# - turn it into Ring Attention, and count the bytes of both.
#
# **Prerequisites.** Softmax attention and NumPy. No GPU and no MPI.
#
# **Time.** About 10 minutes, and 5 more for the exercise.

# %% [markdown] tags=["filled"]
# {{ buttons }}
#
# Reading is enough. To run the notebook, use `make lab` in the repository. In a browser, with
# nothing installed, enter the address of the repository at [mybinder.org](https://mybinder.org), or
# open this notebook in [Colab](https://colab.research.google.com), from the tab GitHub; the folded
# cell below then installs what is missing. Elsewhere it does nothing. The other notebooks have no
# such cell: they run on Binder, or with `make lab`.
#
# In all notebooks, **Predict.** marks a question. Decide on an answer before you open its
# *Reasoning* and run the next cell: wrong guesses are remembered best.

# %% tags=["filled", "hide-input"]
# On Colab: fetch the repository, install it and go to its tutorials. Elsewhere this does nothing.
import importlib
import importlib.util
import os
import subprocess
import sys

REPOSITORY = "{{ repository }}"  # @param {type: "string"}

if importlib.util.find_spec("lvxattn") is None:
    if not REPOSITORY:
        raise ValueError("lvxattn is missing: set REPOSITORY to the address of its repository")
    if not os.path.exists("lv-xattn"):
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "lv-xattn"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "./lv-xattn[mpi,tutorials]", "mpich"], check=True)
    importlib.invalidate_caches()
if os.path.isdir("lv-xattn/tutorials"):  # after a restart of the runtime, too
    os.chdir("lv-xattn/tutorials")
    sys.path.insert(0, os.getcwd())

# %% [markdown]
# ## Too much for one GPU
#
# Llama 3-V turns a frame of video into 6,404 tokens, and 20 minutes at one frame per second are
# 1,200 frames. Each of its 8 cross-attention layers keeps a key and a value for every token, in 8
# heads, with 128 numbers of 2 bytes.
#
# **Predict.** How many GPUs of 80 GB do keys and values fill?
#
# <details><summary>Reasoning</summary>
#
# 2 (key and value) · 8 layers · 8 heads · 1,200 · 6,404 tokens · 128 numbers · 2 bytes = 252 · 10⁹
# bytes, which is 234.5 GiB: more than three GPUs.
#
# </details>

# %%
from lvxattn.plan import MACHINES, MODELS, messages, planned

llama, text, frames = MODELS["llama3v"], 2048, 1200
keys = frames * llama.tokens_per_frame
per_layer = 2 * llama.kv_heads * keys * llama.head_dim * 2  # k and v; 2 bytes
total, gpu = llama.cross_layers * per_layer, MACHINES["a100-16"].room
print(
    f"keys and values: {total / 2**30:.1f} GiB, or {total / 1e9:.0f} GB; a GPU: {gpu / 1e9:.0f} GB"
)
assert 234 < total / 2**30 < 235
assert 3 * gpu < total < 4 * gpu

# %% [markdown]
# ## Move the short side
#
# So let four GPUs keep a quarter of the keys and values each, and a quarter of the queries. Below a
# GPU is a *rank*: a process with its own memory and a number. Every query has to meet every key, so
# one of the two has to travel: from rank 0 to 1, to 2, to 3, and back to 0. That is a ring, and one
# step on it is a *hop*. The text has 2,048 queries in 32 heads, the video 7.7 million keys in 8,
# and results travel with 4 bytes for a number, all else with 2.
#
# **Predict.** If keys and values travel, how many times as many bytes are sent as if queries and
# their results do?
#
# <details><summary>Reasoning</summary>
#
# There are 3,752 keys for every query. But a query has 32 heads and a key has 8, which leaves 938.
# Two arrays travel on either side; a result has 4 bytes for a number, all others have 2, so divide
# by 6 / 4: 625. The exact number is a little less, because `lse`, introduced below, travels too, as
# two numbers ([notebook 2](02_why_queries_move.ipynb)).
#
# </details>

# %%
sends = {}
for schedule in ("lv-xattn", "ring"):
    layout = planned(*llama.shapes(text, frames), P=4, schedule=schedule)
    sends[schedule] = sum(message.nbytes for message in messages(layout, rank=0))
    print(f"{schedule:8}  a rank sends {sends[schedule] / 1e6:10,.1f} MB in one layer")
print(f"ratio {sends['ring'] / sends['lv-xattn']:.0f}")
assert round(sends["ring"] / sends["lv-xattn"]) == 619

# %% tags=["hide-input"]
from figures import ten_minutes

# A rank's keys and values, and what it sends in one hop.
ten_minutes.two_rings(per_layer / 4, sends["lv-xattn"] / 3, sends["ring"] / 3)

# %% [markdown]
# Areas are bytes. On the left the small orange squares travel: queries and results. On the right
# the blue ones travel: keys and values. The numbers are those of `planned` and `messages`, this
# project's planner, which counts the bytes from the sizes of the model. The factor depends on the
# model: OpenFlamingo, with 64 tokens a frame, has 24 ([notebook 2](02_why_queries_move.ipynb)).
#
# ## Attention in pieces
#
# A rank sees only its own keys. A query with the scores $s_j$ needs two sums over all of them:
#
# $$\mathrm{out} = \frac{\sum_j e^{s_j}\, v_j}{\sum_j e^{s_j}} \qquad\qquad
#   \mathrm{lse} = \log \sum_j e^{s_j}$$
#
# A rank computes both over its own keys. Two such results $a$ and $b$ *merge* into the result over
# the keys of both: denominators add, and so do numerators, which are
# $e^{\mathrm{lse}}\,\mathrm{out}$.
#
# $$\mathrm{lse} = \log\left(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}\right) \qquad\qquad
#   \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}}\,\mathrm{out}_a
#                + e^{\mathrm{lse}_b - \mathrm{lse}}\,\mathrm{out}_b$$
#
# Nothing is approximated.
#
# <div class="alert alert-info">
#
# **Takeaway.** `(out, lse)` over some keys, merged with `(out, lse)` over other keys, is attention
# over all of them. So a query can go from rank to rank, and its result grows on the way.
#
# </div>
#
# ## All of it
#
# `lv_xattn` is the algorithm: what one rank does with its `q`, `k` and `v`. `ring` starts the
# ranks, which are threads here: `send` puts copies of arrays into the queue of the next rank, and
# `receive` waits for what the previous rank sends.

# %% tags=["subject"]
from queue import Queue
from threading import Thread

import numpy as np


def attend(q, k, v):
    """Return softmax attention over these keys, and the log of its denominator."""
    s = q @ k.T / np.sqrt(q.shape[1])
    top = s.max(axis=1, keepdims=True)  # subtracted, so that exp does not overflow
    p = np.exp(s - top)
    total = p.sum(axis=1, keepdims=True)
    return p @ v / total, top + np.log(total)


def merge(out_a, lse_a, out_b, lse_b):
    """Return the result over the keys of both."""
    lse = np.logaddexp(lse_a, lse_b)
    return np.exp(lse_a - lse) * out_a + np.exp(lse_b - lse) * out_b, lse


def lv_xattn(q, k, v, send, receive, P):
    """Run on each of P ranks: k and v stay, q and its result travel."""
    out, lse = attend(q, k, v)  # my queries, my keys
    for _ in range(P - 1):
        send(q, out, lse)
        q, out, lse = receive()  # another rank's, over the keys of all ranks it has been on
        out, lse = merge(out, lse, *attend(q, k, v))
    send(out, lse)  # the next rank is their owner
    return receive()


def ring(program, q, k, v):
    """Run a program on len(q) ranks; return their results, and the bytes that each one sent."""
    P, queues, results, sent = len(q), [Queue() for _ in q], [None for _ in q], [0 for _ in q]

    def rank(r):
        def send(*arrays):
            sent[r] += sum(x.nbytes for x in arrays)
            queues[(r + 1) % P].put([x.copy() for x in arrays])

        results[r] = program(q[r], k[r], v[r], send, lambda: queues[r].get(timeout=10), P)

    threads = [Thread(target=rank, args=(r,)) for r in range(P)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, sent


# %% [markdown]
# Whose queries are on which rank? Follow $q_0$ along the diagonal:
#
# | | rank 0 | rank 1 | rank 2 | rank 3 |
# |---|---|---|---|---|
# | at first | **$q_0$** | $q_1$ | $q_2$ | $q_3$ |
# | hop 1 | $q_3$ | **$q_0$** | $q_1$ | $q_2$ |
# | hop 2 | $q_2$ | $q_3$ | **$q_0$** | $q_1$ |
# | hop 3 | $q_1$ | $q_2$ | $q_3$ | **$q_0$** |
# | last hop, results only | **out** of $q_0$ | out of $q_1$ | out of $q_2$ | out of $q_3$ |
#
# **Predict.** At hop 2, over whose keys is the result that has come to rank 2 with $q_0$?
#
# <details><summary>Reasoning</summary>
#
# Those of ranks 0 and 1, where it has been. Rank 2 attends to its own keys and merges.
#
# </details>

# %%
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((rows, 16)) for rows in (32, 4096, 4096))
shards = [np.split(x, 4) for x in (q, k, v)]
whole, _ = attend(q, k, v)  # in one process

results, sent = ring(lv_xattn, *shards)
out = np.concatenate([out for out, _ in results])
equal = abs(out - whole).max() < 1e-14
print("four ranks and one process differ by less than 1e-14:", equal)
assert equal

# %% [markdown]
# **Predict.** A rank has 8 queries. A query has 16 numbers, `out` has 16, `lse` is one, and a
# number has 8 bytes here. How many bytes does a rank send?
#
# <details><summary>Reasoning</summary>
#
# Three times queries and results, 8 · (16 + 16 + 1) · 8 = 2,112 bytes, and once results alone, 8 ·
# 17 · 8 = 1,088: together 7,424.
#
# </details>

# %%
print("each rank sends", sent, "bytes; its keys and values have", shards[1][0].nbytes * 2)
assert sent == [3 * 2112 + 1088] * 4 == [7424] * 4

# %% [markdown]
# Keys are not in this number: a longer video adds keys, which stay, and no bytes.
#
# ### Exercise 1: change what travels
#
# Turn the algorithm into Ring Attention: queries and results stay, keys and values travel, both in
# one message for each hop. Use `attend` and `merge`, and return `(out, lse)`. Three lines change,
# and one becomes superfluous.


# %% tags=["exercise"]
def ring_attention(q, k, v, send, receive, P):
    """Run on each of P ranks: q and its result stay, k and v travel."""
    out, lse = attend(q, k, v)
    for _ in range(P - 1):
        send(q, out, lse)
        q, out, lse = receive()
        out, lse = merge(out, lse, *attend(q, k, v))
    send(out, lse)
    return receive()


# %% tags=["check", "hide-input"]
from unittest.mock import patch

from exercise import check
from exercise_ranks import on_virtual_ranks

from lvxattn.reference import full_attention


def try_on(P, D, D_V, level=0):
    """Run the reader's program on P ranks, each with shards of its own length.

    Scores of the first and the last rank's keys are near -level and level.
    """
    rng, calls = np.random.default_rng(P), {"attend": 0, "merge": 0}
    q, k = ([rng.standard_normal((n, D)) for n in rows]
            for rows in (range(3, 3 + P), range(9, 9 - P, -1)))  # fmt: skip
    v = [rng.standard_normal((len(x), D_V)) for x in k]
    for x, keys, score in zip(q, k, np.linspace(-level, level, P), strict=True):
        x[:, 0], keys[:, 0] = 1, score * D**0.5
    where = f"{P} rank{'s' * (P > 1)}" + f", scores near {-level} to {level}" * (level > 0)
    rule = "is to be over the keys of all ranks, each once"

    def on_a_rank(comm):
        right, left = (comm.rank + 1) % P, (comm.rank - 1) % P
        mine = [x[comm.rank].copy() for x in (q, k, v)]
        return ring_attention(
            *mine, lambda *arrays: comm.send(arrays, right), lambda: comm.recv(left), P
        )

    def attend_and_shift(q, k, v, attend=attend):
        calls["attend"] += 1
        assert len(k) <= 9, f"attend was given {len(k)} keys at once, a rank keeps at most 9"
        out, lse = attend(q, k, v)
        return out + 0.5, lse + 0.25  # so are the merged ones, and those of no other attention

    def counted_merge(*parts, merge=merge):
        calls["merge"] += 1
        return merge(*parts)

    with patch("__main__.attend", attend_and_shift), patch("__main__.merge", counted_merge):
        found, log = on_virtual_ranks(P, on_a_rank, most=3 * P, where=where)
    for r, got in enumerate(found):
        who, sent = f"{where}: rank {r}", [m.nbytes for m in log if m.source == r]
        assert isinstance(got, (tuple, list)), f"{who} returns no (out, lse)"
        assert len(got) == 2, f"{who} returns {len(got)} arrays, expected (out, lse)"
        wrong = f"{who} sent {len(sent)} messages, expected {P - 1}: k and v at each hop"
        assert len(sent) == P - 1, wrong
        for n, nbytes in enumerate(sent):
            want = k[(r - n) % P].nbytes + v[(r - n) % P].nbytes
            wrong = f"{who} sent {nbytes} bytes at hop {n + 1}, expected {want}"
            assert nbytes == want, f"{wrong}: k and v of rank {(r - n) % P}, and nothing else"
        whole = (np.concatenate(x)[None, None] for x in (k, v))
        out, lse = full_attention(q[r][None, None], *whole, scale=D**-0.5)
        right = out[0, 0] + 0.5, lse[0, 0, :, None] + 0.25
        for name, x, y in zip(("out", "lse"), map(np.asarray, got), right, strict=True):
            assert x.shape == y.shape, f"{who}: {name} has shape {x.shape}, expected {y.shape}"
            off = abs(x - y).max()
            assert off < 1e-12 * (1 + level), f"{who}: {name} {rule}, and is off by {off:.0e}"
    for name, times in (("attend", P * P), ("merge", P * (P - 1))):
        wrong = f"{where}: {name} was called {calls[name]} times, expected {times}"
        assert calls[name] == times, wrong


with check("on any number of ranks only k and v travel", hide="q k v shards whole results"):
    for case in ((3, 4, 5), (2, 6, 6), (5, 3, 2), (1, 4, 4), (4, 4, 3, 1000)):
        try_on(*case)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def ring_attention(q, k, v, send, receive, P):
#     """Run on each of P ranks: q and its result stay, k and v travel."""
#     out, lse = attend(q, k, v)
#     for _ in range(P - 1):
#         send(k, v)
#         k, v = receive()
#         out, lse = merge(out, lse, *attend(q, k, v))
#     return out, lse
# ```
#
# </details>

# %% [markdown]
# The next cell contains the answer, and counts the bytes of both for longer and longer videos.
#
# **Predict.** Which of the two grows, and how?
#
# <details><summary>Reasoning</summary>
#
# Ring Attention sends three times a quarter of all keys and values: with ten times the video, ten
# times the bytes. LV-XAttn sends as much as before.
#
# </details>


# %% tags=["hide-input"]
def keys_travel(q, k, v, send, receive, P):
    """Run Ring Attention, the answer to exercise 1."""
    out, lse = attend(q, k, v)
    for _ in range(P - 1):
        send(k, v)
        k, v = receive()
        out, lse = merge(out, lse, *attend(q, k, v))
    return out, lse


for n in (400, 4000, 40_000):
    longer = [np.split(rng.standard_normal((rows, 16)), 4) for rows in (32, n, n)]
    (ours, lv), (theirs, kv) = (ring(program, *longer) for program in (lv_xattn, keys_travel))
    assert np.allclose(np.vstack([x for x, _ in ours]), np.vstack([x for x, _ in theirs]))
    assert lv == [7424] * 4 and kv == [3 * 2 * n // 4 * 16 * 8] * 4
    times = f"{kv[0] / lv[0]:,.0f} times"
    print(f"{n:6,} keys: lv_xattn sends {lv[0]:,} bytes a rank, Ring Attention {kv[0]:9,}: {times}")

# %% [markdown]
# ## What forty lines leave out
#
# - **Time.** Here a block leaves when the work with it is done. The library sends queries on before
#   it computes with them, and their result one hop later, so that both travel while ranks compute;
#   the owner adds its own part when the result is home, so that one result less travels
#   ([notebook 3](03_the_ring_in_one_process.ipynb), [4](04_real_ranks_with_mpi.ipynb)).
# - **Masks and empty shards.** Over no keys, `attend` fails on the maximum, and `merge` gives NaN
#   ([notebook 1](01_merging_softmax.ipynb)).
# - **The backward.** Queries travel again, and bring gradients home ([notebook
#   5](05_going_backward.ipynb)). Keys and values need not be stored ([notebook
#   6](06_forgetting_keys_and_values.ipynb)).
# - **Precision.** This is fp64. In bf16, partial results travel in fp32
#   ([notebook 2](02_why_queries_move.ipynb)).
# - **When it does not pay.** With a long text and a short video, keys are the side to move.
#
# The library's own version of `lv_xattn` has six numbered steps:
# [reference/lv_xattn.py](../reference/lv_xattn.py). LV-XAttn and the sizes of the models are from
# [arXiv:2502.02406](https://arxiv.org/abs/2502.02406), Ring Attention is from
# [arXiv:2310.01889](https://arxiv.org/abs/2310.01889).
#
# <div class="alert alert-info">
#
# **Takeaways.** Partial results merge exactly, so queries can visit the keys where they are. What a
# rank sends then depends on the text, and not on the length of the video. Ring Attention is the
# same loop, with keys and values in place of queries and results.
#
# </div>

# %% [markdown]
# ## Glossary
#
# | word | meaning |
# |---|---|
# | rank | one of $P$ processes, each with its own memory and usually its own GPU; also its number |
# | shard | the part of an array that a rank keeps |
# | hop | one step of a block, from a rank to the next one of the ring |
# | schedule | which data is sent to which rank, and when: LV-XAttn, Ring Attention, all-to-all |
# | lse | log-sum-exp: the log of the sum of the exponentials of the scores, softmax's denominator |
# | partial result | `(out, lse)` over some of the keys |
# | online softmax | softmax over keys that come piece by piece: the merge, used in a loop |
# | GQA | grouped-query attention: several query heads share the keys and values of one head |
# | sequence parallelism | tokens are divided among ranks, instead of layers or the batch |
# | context parallelism | sequence parallelism in attention: keys, queries or both are divided |
# | checkpointing | of activations: store less in the forward, recompute in the backward |
# | all-to-all | each rank sends a different part of its data to each other rank, at the same time |
# | all-gather | afterwards every rank has the data of all |

# %% [markdown] tags=["filled"]
# ## Where to go on
#
# {{ paths }}
#
# The whole course, in order, is on the page [learn](../docs/learn.md), which also has the files of
# the code in reading order.
#
# Next: [notebook 1, merging softmax](01_merging_softmax.ipynb).
