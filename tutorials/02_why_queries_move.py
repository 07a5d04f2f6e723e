# %% [markdown]
# # 2. Why queries move
#
# One layer of cross-attention, forward and backward, on four hosts whose links were held to 50
# Mbit/s, took 103 seconds with Ring Attention, which moves keys and values, and 1.4 seconds with
# queries moved in their place. This notebook computes both figures from the bytes and one measured
# time, that of a turn without messages: what a schedule sends is known before anything runs.
#
# **You will be able to**
#
# - compute what every schedule sends for a given model, without a cluster;
# - tell when Ring Attention is the better choice;
# - predict what a faster network changes, and compare the prediction with a measurement.
#
# **Prerequisites.** [Notebook 1](01_merging_softmax.ipynb) for `(out, lse)`.
#
# **Time.** About 30 minutes.
#
# A *rank* is one process with its own memory, typically one GPU. There are $P$ ranks, which
# exchange data by messages. A *schedule* determines what is sent to which rank, and when.

# %%
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from exercise import check
from figures import moving

from lvxattn.draw.bars import byte_bars
from lvxattn.draw.plan import winners
from lvxattn.plan import MACHINES, MODELS, Link, candidates, memory, messages, planned, play

# %matplotlib inline

# %% [markdown]
# ## Text is short, video is long
#
# In cross-attention the queries are text and the keys and values are video. With batch size $B$,
# $H$ query heads, $H_{KV}$ key-value heads that they share (grouped-query attention, GQA), and head
# dimension $D$, `q` is $(B, H, S_Q, D)$ and `k` and `v` are $(B, H_{KV}, S_{KV}, D)$ each.
#
# **Predict.** Llama 3-V turns one video frame into 6,404 visual tokens. The input is a video of 20
# minutes, at one frame per second, and 2,048 tokens of text. How many keys does one query attend
# to?
#
# <details><summary>Reasoning</summary>
#
# 20 · 60 frames · 6,404 tokens = 7.7 million, about 3,750 for every token of text.
#
# </details>

# %%
TEXT, FRAMES = 2048, 1200
for model in MODELS.values():
    q, k = model.shapes(TEXT, FRAMES)
    print(f"{model.name:16} q {q!s:20} k {k!s:24} S_KV / S_Q {k[2] / q[2]:7,.1f}")
    assert k[2] > 30 * q[2]
llama = MODELS["llama3v"]
assert llama.shapes(TEXT, FRAMES)[1][2] == 7_684_800

# %% [markdown]
# Each line is one cross-attention layer. The sizes are those of the models in the LV-XAttn paper
# ([arXiv:2502.02406](https://arxiv.org/abs/2502.02406), table 1).
#
# ## More memory than one GPU has
#
# **Predict.** Llama 3-V has 8 cross-attention layers, each with its own keys and values, and a
# number has 2 bytes. How much memory do `k` and `v` of all layers need?
#
# <details><summary>Reasoning</summary>
#
# 2 (k and v) · 8 layers · 8 heads · 7,684,800 keys · 128 · 2 bytes = 252 · 10⁹ bytes, or 234.5 GiB:
# more than three GPUs of 80 GB.
#
# </details>

# %%
taken = memory(llama, TEXT, FRAMES, 1, dtype="bfloat16", recompute=False)
print(f"{taken.keys / 2**30:.1f} GiB of keys and values, {taken.text / 2**30:.1f} GiB of text")
assert 234 < taken.keys / 2**30 < 235
assert taken.keys > 100 * taken.text and taken.keys > 3 * 80e9

# %% [markdown]
# The paper states "over 234 GB". Keys and values have to be sharded over ranks: each holds $s_{KV}
# = S_{KV}/P$ of them, and $s_Q = S_Q/P$ of the queries. Every query attends to every key, so either
# queries or keys have to be sent.
#
# ## Five schedules
#
# | schedule | what moves | size of one message |
# |---|---|---|
# | `lv-xattn` | queries, round a ring; their results follow | $\sim s_Q$ |
# | `gather` | queries, by all-gather; results directly to their owners | $\sim s_Q$ |
# | `ring` | keys and values, round a ring | $\sim s_{KV}$ |
# | `grid` | queries along columns of ranks, keys along rows | $\sim s_Q$ and $\sim s_{KV}$ |
# | `ulysses` | everything, by all-to-all: each rank gets $H/P$ heads | $\sim (s_Q + s_{KV})/P$ |
#
# `ring` is Ring Attention ([arXiv:2310.01889](https://arxiv.org/abs/2310.01889)) and `ulysses`
# DeepSpeed-Ulysses ([arXiv:2309.14509](https://arxiv.org/abs/2309.14509)).
#
# In each schedule but `grid`, [which comes last](#Where-neither-side-is-short:-a-grid), a rank
# sends $P - 1$ messages of a kind. LV-XAttn has two kinds in the forward
# pass: queries, and the partial results `(out, lse)` that follow them and are merged on the way. On
# the wire lse is a pair: the largest score $m$ and $\sum_j e^{s_j - m}$. As a single number it
# would lose the log of that sum to rounding next to a mask of -1e9.
#
# `planned` makes the layout of a hypothetical problem, and `messages` lists what a rank would send.

# %%
P = 4
q, k = llama.shapes(TEXT, FRAMES)
for schedule in ("lv-xattn", "ring"):
    sent = messages(planned(q, k, P, schedule=schedule), rank=0)
    print(f"{schedule:9}", ", ".join(f"{m.kind} {m.nbytes / 1e6:,.1f} MB" for m in sent))
    assert len(sent) == (P - 1) * (2 if schedule == "lv-xattn" else 1)

# %% [markdown]
# **Predict.** How many times the bytes of `lv-xattn` does `ring` send here? There are 3,752 times
# as many keys as queries, two arrays rotate in both schedules, and each key-value head is shared by
# four query heads, all of which travel.
#
# <details><summary>Reasoning</summary>
#
# 3,752 / 4 (shared heads) = 938. Partial results travel in fp32, twice the size of the bf16
# queries, so LV-XAttn sends 6 bytes for every 4 bytes of ring: 938 · 4 / 6 = 625, a little less
# with lse.
#
# </details>


# %%
def sends(model, text, frames, P, schedule, backward=False):
    layout = planned(*model.shapes(text, frames), P, schedule=schedule)
    return sum(m.nbytes for m in messages(layout, rank=0, backward=backward))


ratio = sends(llama, TEXT, FRAMES, P, "ring") / sends(llama, TEXT, FRAMES, P, "lv-xattn")
print(f"ring sends {ratio:.0f} times the bytes of lv-xattn")
assert 600 < ratio < 625

# %%
names = ["llama3v", "mplug-owl3-7b", "openflamingo-9b"]
order = ["lv-xattn", "gather", "ulysses", "ring"]
bars = {n: {s: sends(MODELS[n], TEXT, FRAMES, P, s) for s in order} for n in names}
for sizes in bars.values():
    assert sizes["lv-xattn"] == sizes["gather"] < sizes["ulysses"] < sizes["ring"]
times = [round(sizes["ring"] / sizes["lv-xattn"]) for sizes in bars.values()]
print("ring sends", dict(zip(names, times, strict=True)), "times the bytes of lv-xattn")
assert times == [619, 40, 24]
byte_bars(bars, f"bytes sent by one of {P} ranks in the forward of one layer")

# %% [markdown]
# On long videos the schedules that move queries send least: here `ring` sends 24 to 619 times as
# much. The factor depends on the tokens per frame, and on how many query heads share keys.
#
# ### Exercise 1: bytes of two schedules
#
# Compute the bytes that a rank sends in one forward with `lv-xattn` and with `ring`. `q`, `k` and
# `v` have 2 bytes per number; `out` and `lse` have 4 on the wire. `P` divides both lengths.


# %% tags=["exercise"]
def bytes_by_hand(B, H, H_KV, S_Q, S_KV, D, P):
    """Return the bytes with lv-xattn and those with ring."""
    raise NotImplementedError("bytes_by_hand is not implemented")


# %% tags=["check", "hide-input"]
from lvxattn import plan


def bytes_of_both(plan=plan):
    for B, H, H_KV, S_Q, S_KV, D, ranks in [
        (1, 8, 8, 64, 640, 64, 4), (2, 6, 2, 15, 990, 32, 5), (3, 8, 1, 12, 36, 128, 2),
        (1, 4, 4, 70, 14, 16, 7), (1, 12, 4, 64, 64, 8, 1),
    ]:  # fmt: skip
        result = bytes_by_hand(B, H, H_KV, S_Q, S_KV, D, ranks)
        pair = isinstance(result, tuple | list) and len(result) == 2
        assert pair, f"expected the bytes with lv-xattn and those with ring, got {result}"
        blocks = (ranks - 1) * B
        q, results, keys = 2 * D, 4 * (D + 2), (S_KV // ranks) * 2 * D  # bytes of a row, of k
        rows = blocks * H * (S_Q // ranks)
        mistakes = {
            "lv-xattn": {
                ranks * rows * (q + results): (ranks - 1, "a block makes P - 1 hops, not P"),
                rows * (q + 4 * (D + 1)): (1, "lse travels as two numbers"),
                rows * (q + 2 * (D + 2)): (1, "partial results have 4 bytes per number"),
                rows * q: (1, "the partial results travel too"),
                blocks * H_KV * (S_Q // ranks) * (q + results): (1, "all query heads travel"),
                rows * (q + results): (B, "there are B of each block"),
            },
            "ring": {
                ranks * blocks * H_KV * 2 * keys: (ranks - 1, "a block makes P - 1 hops, not P"),
                blocks * H_KV * keys: (1, "v travels too"),
                blocks * H * 2 * keys: (1, "the heads that share keys send them once"),
                blocks * H_KV * 2 * keys: (B, "there are B of each block"),
            },
        }
        for schedule, got in zip(("lv-xattn", "ring"), result, strict=True):
            layout = plan.planned((B, H, S_Q, D), (B, H_KV, S_KV, D), ranks, schedule=schedule)
            want = sum(m.nbytes for m in plan.messages(layout, rank=0))
            causes = [text for wrong, (n, text) in mistakes[schedule].items() if wrong == got * n]
            sizes = f"{schedule}, B = {B}, H = {H}, H_KV = {H_KV}, P = {ranks}"
            cause = f": {causes[0]}" if causes else ""
            assert got == want, f"{sizes}: expected {want:,} bytes, got {got:,}{cause}"


with check("the bytes of both schedules are those of the plan",
           hide="sends P", hide_packages="lvxattn"):  # fmt: skip
    bytes_of_both()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def bytes_by_hand(B, H, H_KV, S_Q, S_KV, D, P):
#     query_row, result_row = 2 * D, 4 * (D + 2)  # out has D numbers, lse two
#     lv_xattn = (P - 1) * B * H * (S_Q // P) * (query_row + result_row)
#     ring = (P - 1) * B * H_KV * (S_KV // P) * 2 * 2 * D  # k and v
#     return lv_xattn, ring
# ```
#
# </details>

# %% [markdown]
# ## Where Ring Attention wins
#
# Let $e$ be the bytes of a number of `q`, `k`, `v`, and $w$ those of a number of a partial result.
# A rank sends $P - 1$ blocks. With LV-XAttn, a block has $H\,s_Q$ rows for each batch entry; a row
# has $D$ numbers of `q`, and its result $D$ of `out` and two of lse. With Ring Attention it has
# $H_{KV}\,s_{KV}$ rows of `k` and as many of `v`:
#
# $$\text{lv-xattn: } (P-1)\,B\,H\,\frac{S_Q}{P}\,\bigl(D\,e + (D + 2)\,w\bigr), \qquad
# \text{ring: } (P-1)\,B\,H_{KV}\,\frac{S_{KV}}{P}\,2D\,e .$$
#
# Set the two equal, and divide both sides by what they share, $(P-1)\,B / P$:
#
# $$H\,S_Q\,\bigl(D\,e + (D + 2)\,w\bigr) = H_{KV}\,S_{KV}\,2D\,e .$$
#
# Divide once more, by $S_{KV}$ and by the factors beside $S_Q$:
#
# $$\frac{S_Q}{S_{KV}} = \frac{H_{KV}}{H}\cdot\frac{2D\,e}{D\,e + (D + 2)\,w} .$$
#
# Neither the batch nor the number of ranks is left.
#
# **Predict.** The paper counts elements, for one head: a round moves $2\frac{S_{KV}}{P}D$ with Ring
# Attention and $2\frac{S_Q}{P}D + \frac{S_Q}{P}$ with LV-XAttn. What is its break-even ratio? What
# is that of Llama 3-V, in which 4 query heads share each key-value head?
#
# <details><summary>Reasoning</summary>
#
# The paper's is 2D / (2D + 1), almost 1: the shorter sequence should move. Shared heads divide that
# by 4, and results of 4 bytes by 1.5: almost 1/6.
#
# </details>

# %%
D = llama.head_dim
even = llama.kv_heads / llama.heads * 2 * D * 2 / (2 * D + 4 * (D + 2))
print(f"the paper's formula {2 * D / (2 * D + 1):.3f}, Llama 3-V in bf16 {even:.3f}")
assert 1 / 6.1 < even < 1 / 6

# %%
for S_KV in (1_552_000, 15_520_000):
    shapes = [((1, 32, round(even * S_KV) + 8 * n, D), (1, 8, S_KV, D)) for n in (-1, 0, 1)]
    lv, ring = (
        [sum(m.nbytes for m in messages(planned(*x, 8, schedule=s), 0)) for x in shapes]
        for s in ("lv-xattn", "ring")
    )
    assert lv[0] < ring[0] and lv[1] == ring[1] and lv[2] > ring[2]
    print(f"{S_KV:10,} keys and {shapes[1][0][2]:9,} queries: both send {lv[1]:,} bytes")

# %% [markdown]
# At exactly this ratio the plan counts equal bytes; with 8 queries fewer `lv-xattn` sends less,
# with 8 more it sends more. So for Llama 3-V queries should move as long as the text has less than
# about a sixth of the tokens of the video. As a function of the length of the video:

# %%
for name, f in (("llama3v", 1), ("openflamingo-9b", 49)):
    ring = [sends(MODELS[name], TEXT, n, 8, "ring") for n in (f, f + 1)]
    lv = [sends(MODELS[name], TEXT, n, 8, "lv-xattn") for n in (f, f + 1)]
    assert ring[0] <= lv[0] == lv[1] < ring[1]
    print(f"{name}: lv-xattn sends less than ring from {f + 1} frames on")

# %%
frames = [2**n for n in range(13)]
sent = {
    (name, s): [sends(MODELS[name], TEXT, f, 8, s) / 1e6 for f in frames]
    for name in ("llama3v", "openflamingo-9b")
    for s in ("lv-xattn", "ring")
}
moving.bytes_over_frames(frames, sent)

# %% [markdown]
# The bytes of `lv-xattn` do not depend on the video. For Llama 3-V the lines cross between one
# frame and two; for OpenFlamingo, with 64 tokens per frame, at 49.
#
# <div class="alert alert-info">
#
# **Takeaway.** What moves decides what is sent: queries and their results, $\sim S_Q$, or keys and
# values, $\sim S_{KV}$. The number of ranks cancels. Bytes in the dtypes that travel, and the heads
# that share keys, set the break-even; count them, not tokens.
#
# </div>
#
# ### Exercise 2: the break-even in frames
#
# What is the least number of frames for which `lv-xattn` sends fewer bytes than `ring` in the
# forward? Use the equation, in bf16 ($e = 2$, $w = 4$); a model has `heads`, `kv_heads`, `head_dim`
# and `tokens_per_frame`. At exactly equal bytes `lv-xattn` does not send fewer.


# %% tags=["exercise"]
def frames_from_which_queries_move(model, text):
    """Return the least number of frames for which lv-xattn sends fewer bytes than ring."""
    raise NotImplementedError("frames_from_which_queries_move is not implemented")


# %% tags=["check", "hide-input"]
from lvxattn import plan


def least_frames(plan=plan):
    from dataclasses import replace as but
    from numbers import Integral

    def total(model, text, frames, schedule, P=4):
        layout = plan.planned(*model.shapes(text, frames), P, schedule=schedule)
        return sum(m.nbytes for rank in range(P) for m in plan.messages(layout, rank))

    large, small = plan.MODELS["llama3v"], plan.MODELS["openflamingo-9b"]
    for model, text in [
        *((model, text) for model in plan.MODELS.values() for text in (4096, 100)),
        # One token a frame, where each byte counts; and the same bytes with 8 frames.
        (but(large, name="32/8 heads of 128, 1 token a frame", tokens_per_frame=1), 4096),
        (but(small, name="8/8 heads of 64, 1 token a frame", tokens_per_frame=1), 1000),
        (but(large, name="8/8 heads of 128, 97 tokens a frame", heads=8, tokens_per_frame=97), 512),
    ]:
        got = frames_from_which_queries_move(model, text)
        where = f"{model.name}, {text} tokens of text"
        assert isinstance(got, Integral), f"{where}: expected a whole number, got {got!r}"
        assert got >= 1, f"{where}: expected 1 frame or more, got {got}"
        for frames, fewer in ((got - 1, False), (got, True)):
            lv, ring = (total(model, text, int(frames), s) for s in ("lv-xattn", "ring"))
            bytes_of_all = f"with frames = {frames} lv-xattn sends {lv:,} bytes and ring {ring:,}"
            assert (lv < ring) == fewer, f"{where}: got {got}, but {bytes_of_all}"


with check("the least number of frames for which queries should move",
           hide="sends TEXT FRAMES llama even D",
           hide_packages="lvxattn"):  # fmt: skip
    least_frames()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def frames_from_which_queries_move(model, text):
#     D, group = model.head_dim, model.heads // model.kv_heads
#     keys = text * group * (2 * D + 4 * (D + 2)) / (2 * 2 * D)  # with as many bytes as the text
#     return int(keys // model.tokens_per_frame) + 1
# ```
#
# </details>

# %% [markdown]
# ## Overlap: bytes hidden behind computing
#
# A rank computes with one block while the next one travels. A hop takes the longer of the two
# times:
#
# $$t_{hop} = \max(t_{compute},\ t_{wire}), \qquad
# t_{compute} = \frac{4\,B\,H\,s_Q\,s_{KV}\,D}{F}, \qquad t_{wire} = \frac{\text{bytes}}{W},$$
#
# with $F$ floating-point operations per second (two products of $2D$ operations for each pair of
# query and key) and $W$ bytes per second on the link. A hop of Ring Attention sends a block of keys
# and values; one of LV-XAttn sends a block of queries and one of results:
#
# $$\text{ring: } t_{wire} = \frac{B\,H_{KV}\,s_{KV}\,2D\,e}{W}, \qquad
# \text{lv-xattn: } t_{wire} = \frac{B\,H\,s_Q\,\bigl(D e + (D+2) w\bigr)}{W} .$$
#
# Divide each by $t_{compute}$, that is, multiply it by $F / (4\,B\,H\,s_Q\,s_{KV}\,D)$. With Ring
# Attention $B$, $s_{KV}$ and $D$ cancel, with LV-XAttn $B$, $H$ and $s_Q$:
#
# $$\text{ring: } \frac{t_{wire}}{t_{compute}} = \frac{H_{KV}\,e\,F}{2\,H\,W\,s_Q}, \qquad
# \text{lv-xattn: } \frac{t_{wire}}{t_{compute}} = \frac{(D e + (D+2) w)\,F}{4\,D\,W\,s_{KV}} .$$
#
# The length of the block that travels cancels; only the length of what stays is left.
#
# <div class="alert alert-info">
#
# **Takeaway.** Ring Attention needs a long text to hide its keys; LV-XAttn needs a long video to
# hide its queries. Here the video is long.
#
# </div>
#
# **Predict.** With twice as many frames, does Ring Attention wait for a larger, an equal or a
# smaller part of its time?
#
# <details><summary>Reasoning</summary>
#
# Equal. Its blocks take twice as long to send and to compute with; the length of the video is not
# in its ratio.
#
# </details>

# %%
# Eight A30 on eight nodes, links of 10 Gbit/s: one of the clusters that the paper measures.
# Copies and the overhead of calls are left out; arithmetic, memory and links remain.
slow = replace(MACHINES["a30-8"], start=0, call=0, copy=1e30)


def share_of_waiting(frames, schedule):
    played = play(planned(*llama.shapes(TEXT, frames), 8, schedule=schedule), slow)
    return played.waiting / played.seconds


# %%
for f in (10, 100, 1000):
    print(f"{f:5} frames: {share_of_waiting(f, 'ring'):.0%} of ring's time is waiting, "
          f"{share_of_waiting(f, 'lv-xattn'):.0%} of lv-xattn's")  # fmt: skip
assert abs(share_of_waiting(100, "ring") - share_of_waiting(1000, "ring")) < 0.01
assert share_of_waiting(1000, "ring") > 0.9 and share_of_waiting(1000, "lv-xattn") < 0.01

# %% [markdown]
# `play` simulates every rank's steps on a machine that is described by a few figures. On this
# cluster Ring Attention spends nearly all of its time waiting, at any length of the video.
#
# ### Exercise 3: how long must the text be?
#
# How many queries does *one rank* need, at least, so that Ring Attention hides its keys behind its
# arithmetic ($t_{wire} \le t_{compute}$)? Return a whole number, for bf16. A machine has `matmul`
# ($F$) and `between.bandwidth` ($W$).


# %% tags=["exercise"]
def queries_that_hide_the_ring(model, machine):
    """Return the least s_q for which a hop's keys take no longer to send than to compute with."""
    raise NotImplementedError("queries_that_hide_the_ring is not implemented")


# %% tags=["check", "hide-input"]
def least_queries():
    from dataclasses import replace as but
    from numbers import Integral

    from lvxattn import plan

    ideal = {"start": 0, "call": 0, "copy": 1e30, "memory": 1e30, "inside": plan.Link(1e30, 0)}
    for machine in (
        but(plan.MACHINES["a30-8"], **ideal, between=plan.Link(1.25e9, 0)),
        but(plan.MACHINES["a100-16"], **ideal, between=plan.Link(25e9, 0)),
        but(plan.MACHINES["a30-8"], **ideal, name="1e13 per s, 1e9 bytes per s", matmul=1e13,
            between=plan.Link(1e9, 0)),
    ):  # fmt: skip
        for name in ("llama3v", "openflamingo-9b", "mplug-owl3-1b"):
            model, where = plan.MODELS[name], f"{name} on {machine.name}"
            got = queries_that_hide_the_ring(model, machine)
            whole = isinstance(got, Integral) or (isinstance(got, float) and got.is_integer())
            assert whole, f"{where}: expected a whole number, got {got!r}"
            # Seconds for each key: its k and v in bf16, and its arithmetic with s_q queries.
            wire = model.kv_heads * 2 * model.head_dim * 2 / machine.between.bandwidth
            work = 4 * model.heads * model.head_dim / machine.matmul
            ratio = f"a hop's keys take {wire / (max(got, 1) * work):.3f} times as long to send"
            enough = got * work >= wire * (1 - 1e-12)
            assert enough, f"{where}: with {got} queries {ratio} as to compute with"
            fewer = (got - 1) * work < wire * (1 - 1e-12)
            assert fewer, f"{where}: {got - 1} queries suffice, got {got}"
    model = plan.MODELS["llama3v"]
    machine = but(plan.MACHINES["a30-8"], **ideal, between=plan.Link(1.25e9, 0))
    s_q = queries_that_hide_the_ring(model, machine)
    for share, waits in ((0.95, True), (1.05, False)):
        layout = plan.planned(*model.shapes(8 * round(share * s_q), 8000), 8, schedule="ring")
        played = plan.play(layout, machine)
        assert (played.waiting > 0.02 * played.seconds) == waits, "the simulation disagrees"


with check("with so many queries a rank hides the keys that travel",
           hide="slow llama play planned share_of_waiting TEXT D"):  # fmt: skip
    least_queries()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# from math import ceil
#
#
# def queries_that_hide_the_ring(model, machine):
#     F, W = machine.matmul, machine.between.bandwidth
#     return ceil(model.kv_heads * 2 * F / (2 * model.heads * W))
# ```
#
# </details>

# %% [markdown]
# For LV-XAttn the same condition holds for the keys. On this cluster a rank needs 120,038 keys of
# Llama 3-V to hide its queries, which is 19 frames; of a video of one hour each rank has 450.

# %%
e, w, F, W = 2, 4, slow.matmul, slow.between.bandwidth
enough = (D * e + (D + 2) * w) * F / (4 * D * W)  # keys of a rank for which lv-xattn's ratio is 1
assert round(enough) == 120_038 and 18 < enough / llama.tokens_per_frame < 19
assert 3600 / 8 == 450  # an hour, a frame a second, 8 ranks
print(f"{enough:,.0f} keys, or {enough / llama.tokens_per_frame:.1f} frames, hide the queries")

# %% [markdown]
# ## The speed-up
#
# **Predict.** If arithmetic took no time, how many times as fast as Ring Attention would LV-XAttn
# be? And if communication took no time?
#
# <details><summary>Reasoning</summary>
#
# Without arithmetic, the ratio of the bytes. Without communication, equally fast: both do the same
# arithmetic.
#
# </details>


# %%
def gain(machine, frames, text=TEXT):
    seconds = {}
    for s in ("ring", "lv-xattn"):
        layout = planned(*llama.shapes(text, frames), 8, schedule=s)
        seconds[s] = sum(play(layout, machine, backward=b).seconds for b in (False, True))
    return seconds["ring"] / seconds["lv-xattn"]


# %%
def bytes_ratio(frames):
    ring, lv = (
        sum(sends(llama, TEXT, frames, 8, s, backward=b) for b in (False, True))
        for s in ("ring", "lv-xattn")
    )
    return ring / lv


# %%
wire_only = replace(slow, matmul=1e30, memory=1e30, between=Link(slow.between.bandwidth, 0))
no_wire = replace(slow, between=Link(1e30, 0))
for f in (1, 64, 1024):
    print(f"{f:5} frames: bytes {bytes_ratio(f):6.1f}, network only {gain(wire_only, f):6.1f}, "
          f"this cluster {gain(slow, f):6.1f}, no network {gain(no_wire, f):.2f}")  # fmt: skip
    assert abs(gain(wire_only, f) / bytes_ratio(f) - 1) < 1e-3
    assert gain(slow, f) <= 1.001 * max(1, bytes_ratio(f)) and abs(gain(no_wire, f) - 1) < 0.01

# %% [markdown]
# These are ratios of predicted times, forward and backward, for one layer of Llama 3-V on 8 ranks.
# The speed-up is that of the bytes until LV-XAttn hides all that it sends. From there on both times
# grow in proportion to the video, and the speed-up is constant.

# %%
assert gain(MACHINES["a30-8"], 4096) > gain(MACHINES["a100-16"], 4096) > 5
three = [MACHINES[m] for m in ("a30-8", "a100-16", "h100")]
assert all(0.85 < gain(m, 1) < 1.1 < gain(m, 2) < bytes_ratio(2) for m in three)
for m in three:
    print(f"{m.name:8} {gain(m, 4096):5.1f} times as fast as ring at 4,096 frames, "
          f"{gain(m, 1):.2f} at one")  # fmt: skip

# %%
lines = {"bytes of ring / bytes of lv-xattn": [bytes_ratio(f) for f in frames]}
lines |= {f"on {m.name}": [gain(m, f) for f in frames] for m in three}
moving.speed_up(frames, lines)

# %% [markdown]
# The dashed line is the ratio of bytes: the paper's elements per round, in the dtypes that travel.
# From two frames on clusters lie between it and 1. They reach a plateau, which is lower for a
# faster network relative to arithmetic: 8 ranks are two hosts of `a100-16` with 25 GB/s between
# them, and a single host of `h100`, with NVLink. The break-even is about one frame on all three.
#
# ## The computed ratio against a measured one
#
# All of this is arithmetic so far. The repository holds a measurement to compare it with:
# [benchmarks/results/network.json](../benchmarks/results/network.json), written by
# [benchmarks/network.py](../benchmarks/network.py). Four hosts are network namespaces of one
# machine with two cores. Each link is held to 50 Mbit/s, which gives these cores about the ratio of
# arithmetic to bandwidth of the GPU cluster above. Turns with `ring` and `lv-xattn` alternate with
# turns that do the same arithmetic and send nothing. Each link counts its bytes.
#
# **Predict.** From the plan's bytes, the rate of the link, and the time of a turn that sends
# nothing: how long does either schedule take?
#
# <details><summary>Reasoning</summary>
#
# A hop takes the longer of its two times. For `ring` that is the wire: bytes over rate. For
# `lv-xattn` it is the arithmetic: as long as a turn that sends nothing.
#
# </details>

# %%
recorded = json.loads(Path("../benchmarks/results/network.json").read_text())
(run,) = recorded["slow"]
shapes = [(1, run[H], run[S], run["D"]) for H, S in (("H", "S_Q"), ("H_KV", "S_KV"))]


def both_passes(schedule):
    layout = planned(*shapes, run["P"], dtype="float32", schedule=schedule)
    return sum(m.nbytes for b in (False, True) for m in messages(layout, 0, backward=b))


planned_bytes = {s: both_passes(s) for s in ("ring", "lv-xattn")}
print(f"recorded {recorded['date']}: {run['P']} hosts, q {shapes[0]}, k {shapes[1]}, fp32")


# %%
def typical(kind, key):
    """Return the median over turns; of what hosts count, the mean over hosts."""
    return median(mean(t[key]) if isinstance(t[key], list) else t[key] for t in run["turns"][kind])


seconds = {kind: typical(kind, "total") for kind in run["turns"]}  # forward and backward
computed = {
    "ring": planned_bytes["ring"] / (run["bits_per_second"] / 8),
    "lv-xattn": seconds["none"],
}
on_link = {s: typical(s, "link") for s in planned_bytes}

# %%
for s in ("ring", "lv-xattn"):
    print(f"{s:9} {planned_bytes[s] / 1e6:6.2f} MB computed, {on_link[s] / 1e6:6.2f} on the link; "
          f"{computed[s]:6.2f} s computed, {seconds[s]:6.2f} measured")  # fmt: skip
one_number = 4 * (run["P"] - 1) * run["H"] * run["S_Q"] // run["P"]
assert planned_bytes["ring"] == typical("ring", "bytes")
assert planned_bytes["lv-xattn"] == typical("lv-xattn", "bytes") + one_number

# %%
ratios = {
    "bytes": [x["ring"] / x["lv-xattn"] for x in (planned_bytes, on_link)],
    "seconds": [x["ring"] / x["lv-xattn"] for x in (computed, seconds)],
}
for name, (by_plan, found) in ratios.items():
    print(f"{name}: ring over lv-xattn {by_plan:.1f} computed, {found:.1f} measured")
assert abs(ratios["bytes"][1] / ratios["bytes"][0] - 1) < 0.01
assert abs(ratios["seconds"][1] / ratios["seconds"][0] - 1) < 0.1
moving.computed_and_measured(ratios)

# %% [markdown]
# The bytes agree to 1 %: the link adds headers, and when this was recorded lse still travelled as
# one number. `ring` takes 7 % longer than its bytes at the nominal rate, and `lv-xattn` 1 % longer
# than a turn that sends nothing. Note the two ratios: bytes say 152, seconds 75, because
# `lv-xattn` is no longer limited by its bytes.
#
# ## Over both lengths, for all schedules
#
# Back to the plan: `winners` draws it over text tokens and frames, on eight A30.

# %%
figure = winners(llama, MACHINES["a30-8"], 8, "bfloat16")
assert gain(slow, 1024, text=16) > 100 and gain(slow, 1, text=16384) < 0.5
assert 5514 / (2386 * llama.tokens_per_frame) < 1e-3 and gain(slow, 2386, text=5514) > 20
for text, shown, best in (
    (16, 1024, "gather"), (8192, 1024, "lv-xattn"), (16384, 4, "ulysses"), (16384, 1, "ring"),
):  # fmt: skip
    layout = planned(*llama.shapes(text, shown), 8)
    assert candidates(layout, MACHINES["a30-8"])[0].schedule == best
    print(f"{text:6,} tokens of text, {shown:5,} frames: {best} is fastest")
figure

# %% [markdown]
# Left: the time of Ring Attention over that of LV-XAttn. Right: the fastest of the five schedules.
# The averages that the paper gives for the Video-MME benchmark, 5,514 text tokens and 2,386 frames,
# are at the upper edge, right of the middle. For long texts about short videos, in the lower right
# corner, Ulysses is fastest and, in the last cell, Ring Attention.
#
# ## Where neither side is short: a grid
#
# Ulysses needs a key-value head for every rank; Llama 3-V has eight. With more ranks, and text
# about as large as the video, is there nothing better than moving one side whole?
#
# Put the ranks into a grid of $a \times b = P$. Queries go round the $a$ ranks of a column, keys
# and values round the $b$ ranks of a row: every block of queries meets every block of keys on one
# rank, the one where its column crosses their row.
#
# **Predict.** 16 ranks, 8,192 queries and 16,384 keys, 32 heads of 128 each, bf16. A rank sends
# $a - 1$ blocks of queries and of their results, and $b - 1$ of keys and values. Which $a$ is best
# in the forward, and how many times fewer bytes are that than the better one of `lv-xattn`
# ($a = 16$) and `ring` ($a = 1$)?
#
# <details><summary>Reasoning</summary>
#
# A block of queries with its results has 512 rows of $H (D e + (D + 2) w)$ bytes, one of keys and
# values 1,024 rows of $H (2 D e)$: 12.6 and 16.8 MB, about the same. So few of each should move:
# $a = b = 4$, three of both, 88 MB. 15 blocks of queries are 191 MB: 2.2 times as many.
#
# </details>

# %%
square = planned((1, 32, 8192, 128), (1, 32, 16384, 128), 16)
for a in (16, 8, 4, 2, 1):
    grid = replace(square, schedule="grid", grid=(a, 16 // a))
    sent = [sum(m.nbytes for m in messages(grid, 0, backward=b)) / 1e6 for b in (False, True)]
    print(f"{a:2} x {16 // a:2}: forward {sent[0]:4.0f} MB, backward {sent[1]:4.0f} MB")
    assert (round(sent[0]) == 88) == (a == 4)
assert next(c.grid for c in candidates(square) if c.schedule == "grid") == (8, 2)

# %% [markdown]
# The ends are LV-XAttn and Ring Attention themselves. In the backward $dk$ and $dv$ travel with the
# keys, in fp32, so fewer keys should: over both passes 8 x 2 is best. On sixteen ranks, where
# Ulysses cannot be taken, the map has a corner for the grid:

# %%
sixteen = winners(llama, MACHINES["a100-16"], 16, "bfloat16")
layout = planned(*llama.shapes(8192, 2), 16)
best = candidates(layout, MACHINES["a100-16"])[0]
assert best.schedule == "grid"
print(f"8,192 tokens of text, 2 frames, 16 ranks: a grid of {best.grid} is fastest")
sixteen

# %% [markdown]
# With four times as many ranks a rank sends half as much: the best $a$ grows as $\sqrt{P}$
# ([volumes](../docs/arguments.md#a-grid-of-ranks)). The price is memory: a rank keeps the queries
# of its whole column until all keys of its row have passed.
#
# ## When bytes are not the bottleneck
#
# In decoding, one token at a time, there are few queries. `lv-xattn` and `gather` send the same
# bytes, as always. But if query blocks arrive one after the other, a rank reads all of its keys
# from memory $P$ times; if they arrive together, it reads them once.
#
# **Predict.** 16 queries on 16 ranks: which of the two is faster, and by how much?
#
# <details><summary>Reasoning</summary>
#
# Gather, by almost P = 16: with one query per block, nearly all of the time is spent reading the
# keys.
#
# </details>

# %%
machine = MACHINES["a100-16"]
for text in (16, TEXT):
    shapes = llama.shapes(text, FRAMES)
    lv, gather = (planned(*shapes, 16, schedule=s) for s in ("lv-xattn", "gather"))
    ratio = play(lv, machine).seconds / play(gather, machine).seconds
    print(f"{text:5} queries, forward: lv-xattn takes {ratio:.1f} times as long as gather")
    assert ratio > 9 if text == 16 else ratio < 1
    assert sum(m.nbytes for m in messages(lv, 0)) == sum(m.nbytes for m in messages(gather, 0))

# %% [markdown]
# With 2,048 queries it is the other way round: `gather` has to wait for all queries before it can
# start, and `lv-xattn` hides its queries behind its arithmetic. `schedule="auto"` selects by time
# if it is given a machine, otherwise by bytes.
#
# ## Summary
#
# <div class="alert alert-info">
#
# **Takeaways.** What to compute before choosing a schedule:
#
# - Moving queries sends fewer bytes as long as the text is shorter than
#   $\frac{H_{KV}}{H}\frac{2De}{De + (D+2)w}$ of the video: a sixth, for Llama 3-V.
# - Communication can be hidden behind computing with what stays: LV-XAttn's queries behind a long
#   video, Ring Attention's keys only behind a long text.
# - Bytes determine the time if the network is the bottleneck; with very few queries `gather` sends
#   the same bytes as `lv-xattn` and is faster.
#
# </div>
#
# Files: [src/lvxattn/plan/models.py](../src/lvxattn/plan/models.py),
# [steps.py](../src/lvxattn/plan/steps.py), [simulate.py](../src/lvxattn/plan/simulate.py),
# [choose.py](../src/lvxattn/plan/choose.py), [machine.py](../src/lvxattn/plan/machine.py),
# [memory.py](../src/lvxattn/plan/memory.py).
#
# Next: [notebook 3, the ring in one process](03_the_ring_in_one_process.ipynb).
