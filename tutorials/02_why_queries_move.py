# %% [markdown]
# # 2. Why queries move
#
# At the end you can say what every schedule sends for a given model before there is a cluster, and
# where Ring Attention is the better choice. You also know what a faster network changes, and what
# it does not.
#
# It needs [notebook 1](01_merging_softmax.ipynb), for `(out, lse)`, and about 25 minutes.
#
# A *rank* is one process with memory of its own, typically one GPU. There are $P$ of them, and what
# one needs of another has to be sent. A *schedule* says what is sent to whom, and when.

# %%
from dataclasses import replace

from exercise import check

from lvxattn.draw.bars import byte_bars
from lvxattn.draw.plan import winners
from lvxattn.draw.rotation import COLOURS, INK, sheet
from lvxattn.plan import (
    MACHINES,
    MODELS,
    Link,
    candidates,
    memory,
    messages,
    planned,
    play,
)

# %matplotlib inline

# %% [markdown]
# ## Text is short, video is long
#
# In cross-attention the queries are text and the keys and values are video. With $B$ for the batch,
# $H$ for the query heads, $H_{KV}$ for the key-value heads that they share, and $D$ for the size of
# a head, `q` is $(B, H, S_Q, D)$ and `k` and `v` are $(B, H_{KV}, S_{KV}, D)$ each.
#
# **Predict.** Llama 3-V turns one video frame into 6,404 visual tokens. Someone asks about a video
# of 20 minutes, one frame a second, in 2,048 tokens of text. How many keys does one query have
# to look at?
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
# Each line is one cross-attention layer. The sizes are those of the models that the LV-XAttn paper
# ([arXiv:2502.02406](https://arxiv.org/abs/2502.02406), table 1) measures.
#
# ## More than one GPU holds
#
# **Predict.** Llama 3-V has 8 cross-attention layers, each with keys and values of its own, and a
# number takes 2 bytes. How much memory do `k` and `v` of all layers need?
#
# <details><summary>Reasoning</summary>
#
# 2 (k and v) · 8 layers · 8 heads · 7,684,800 keys · 128 · 2 bytes = 252 · 10⁹ bytes, or 234.5 GiB:
# three GPUs of 80 GB are not enough.
#
# </details>

# %%
taken = memory(llama, TEXT, FRAMES, 1, dtype="bfloat16", recompute=False)
print(f"{taken.keys / 2**30:.1f} GiB of keys and values, {taken.text / 2**30:.1f} GiB of text")
assert 234 < taken.keys / 2**30 < 235
assert taken.keys > 100 * taken.text and taken.keys > 3 * 80e9

# %% [markdown]
# The paper speaks of "over 234 GB". Keys and values have to be spread over ranks: each holds
# $s_{KV} = S_{KV}/P$ of them, and $s_Q = S_Q/P$ of the queries. Every query still has to meet every
# key, so something has to move.
#
# ## Four ways to move
#
# | schedule | what moves | size of one message |
# |---|---|---|
# | `lv-xattn` | queries, round a ring; their results follow | $\sim s_Q$ |
# | `gather` | queries, to all ranks at once; results straight home | $\sim s_Q$ |
# | `ring` | keys and values, round a ring | $\sim s_{KV}$ |
# | `ulysses` | everything: each rank gets all lengths of $H/P$ heads | $\sim (s_Q + s_{KV})/P$ |
#
# `ring` is Ring Attention ([arXiv:2310.01889](https://arxiv.org/abs/2310.01889)) and `ulysses`
# DeepSpeed-Ulysses ([arXiv:2309.14509](https://arxiv.org/abs/2309.14509)).
#
# In each, a rank sends $P - 1$ messages of a kind. LV-XAttn has two kinds in the forward pass:
# queries, and the partial results `(out, lse)` that follow them and are merged on the way. There
# lse is two numbers, the largest score and the sum of all, exponentiated and divided by the
# exponential of the largest: beside a mask of -1e9 a single number would lose the log of that sum.
#
# `planned` lays out a problem that nobody has yet, and `messages` lists what a rank would send.

# %%
P = 4
q, k = llama.shapes(TEXT, FRAMES)
for schedule in ("lv-xattn", "ring"):
    sent = messages(planned(q, k, P, schedule=schedule), rank=0)
    print(f"{schedule:9}", ", ".join(f"{m.kind} {m.nbytes / 1e6:,.1f} MB" for m in sent))
    assert len(sent) == (P - 1) * (2 if schedule == "lv-xattn" else 1)

# %% [markdown]
# **Predict.** How many times the bytes of `lv-xattn` does `ring` send here? There are 3,752 times
# as many keys as queries, two arrays go round in each case, and the four query heads that share a
# key-value head have to travel one by one.
#
# <details><summary>Reasoning</summary>
#
# 3,752 / 4, for the shared heads, is 938. Partial results travel in fp32, twice the size of the
# bf16 queries, so that LV-XAttn sends 6 bytes where ring sends 4: 938 · 4 / 6 = 625, a little less
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
assert [round(sizes["ring"] / sizes["lv-xattn"]) for sizes in bars.values()] == [619, 40, 24]
byte_bars(bars, f"bytes that one of {P} ranks sends in the forward of one layer")

# %% [markdown]
# On long videos the schedules that move queries send least: here 24 to 619 times less than `ring`.
# How much less depends on the tokens that a frame becomes, and on how many heads share keys.
#
# ### Exercise 1: bytes by hand
#
# Write the bytes that a rank sends in one forward with `lv-xattn` and with `ring`. `q`, `k` and `v`
# have 2 bytes a number; `out` and `lse` travel with 4. `P` divides both lengths.


# %% tags=["exercise"]
def bytes_by_hand(B, H, H_KV, S_Q, S_KV, D, P):
    """Return the bytes with lv-xattn, and those with ring."""
    raise NotImplementedError("bytes_by_hand is still to be written")


# %% tags=["check"]
with check("the bytes of both schedules, as the plan counts them"):
    for B, H, H_KV, S_Q, S_KV, D, ranks in [(1, 8, 8, 64, 640, 64, 4), (2, 6, 2, 15, 990, 32, 5)]:
        found = bytes_by_hand(B, H, H_KV, S_Q, S_KV, D, ranks)
        for schedule, got in zip(("lv-xattn", "ring"), found, strict=True):
            layout = planned((B, H, S_Q, D), (B, H_KV, S_KV, D), ranks, schedule=schedule)
            want = sum(m.nbytes for m in messages(layout, rank=0))
            assert got == want, f"{schedule}, P = {ranks}: expected {want} bytes, got {got}"

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
# With $e$ bytes for a number of `q`, `k`, `v` and $w$ for one of a partial result, both send the
# same where
#
# $$H\,S_Q\,\bigl(D\,e + (D + 2)\,w\bigr) = H_{KV}\,S_{KV}\,2D\,e .$$
#
# $B$ and $P$ are on both sides. Solved for the ratio of the lengths,
#
# $$\frac{S_Q}{S_{KV}} = \frac{H_{KV}}{H}\cdot\frac{2D\,e}{D\,e + (D + 2)\,w} .$$
#
# **Predict.** The paper counts elements, for one head: a round moves $2\frac{S_{KV}}{P}D$ with Ring
# Attention and $2\frac{S_Q}{P}D + \frac{S_Q}{P}$ with LV-XAttn. Where is its break-even? How far is
# that of Llama 3-V, which shares each key-value head among 4 query heads, from it?
#
# <details><summary>Reasoning</summary>
#
# The paper's is 2D / (2D + 1), almost 1: whichever is shorter should move. Shared heads divide that
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

# %% [markdown]
# The plan counts the same bytes at exactly this ratio, fewer with `lv-xattn` at 8 queries less, and
# more at 8 queries more. So queries should move while the text is shorter than about a sixth of the
# video. In pictures, over the length of the video:

# %%
for name, f in (("llama3v", 1), ("openflamingo-9b", 49)):
    ring = [sends(MODELS[name], TEXT, n, 8, "ring") for n in (f, f + 1)]
    lv = [sends(MODELS[name], TEXT, n, 8, "lv-xattn") for n in (f, f + 1)]
    assert ring[0] <= lv[0] == lv[1] < ring[1]

# %% tags=["hide-input"]
frames = [2**n for n in range(13)]
figure, axes = sheet(3.4)
for name, s in (("llama3v", "-"), ("openflamingo-9b", "--")):
    for schedule in ("lv-xattn", "ring"):
        y = [sends(MODELS[name], TEXT, f, 8, schedule) / 1e6 for f in frames]
        axes.loglog(frames, y, s, color=COLOURS[schedule == "ring"], lw=2)
        axes.text(frames[-1], y[-1], f"  {schedule}, {name}", va="center", color=INK, size=10)
axes.set(xlabel="frames", ylabel="megabytes that a rank sends", xlim=(1, 4096))
axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
axes.set_yticks([1, 100, 10_000], ["1", "100", "10,000"])
figure

# %% [markdown]
# What `lv-xattn` sends does not depend on the video at all. For Llama 3-V the lines cross
# between one frame and two; for OpenFlamingo, with 64 tokens a frame, at 49.
#
# ### Exercise 2: the break-even in frames
#
# From how many frames on does `lv-xattn` send fewer bytes than `ring` in the forward? Use the
# equation, in bf16 ($e = 2$, $w = 4$); a model has `heads`, `kv_heads`, `head_dim` and
# `tokens_per_frame`.


# %% tags=["exercise"]
def frames_from_which_queries_move(model, text):
    """Return the least number of frames with which lv-xattn sends fewer bytes than ring."""
    raise NotImplementedError("frames_from_which_queries_move is still to be written")


# %% tags=["check"]
with check("the least number of frames for which queries should move"):
    for model in MODELS.values():
        got = frames_from_which_queries_move(model, 4096)
        assert isinstance(got, int), f"{model.name}: expected an int, got {got!r}"
        for f, fewer in ((got - 1, False), (got, True)):
            lv, ring = (sends(model, 4096, f, 1024, s) for s in ("lv-xattn", "ring"))
            says = f"{model.name}: with {f} frames lv-xattn sends {lv} bytes and ring {ring}"
            assert (lv < ring) == fewer, f"{says}, you say {got}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def frames_from_which_queries_move(model, text):
#     D, group = model.head_dim, model.heads // model.kv_heads
#     keys = text * group * (2 * D + 4 * (D + 2)) / (2 * 2 * D)  # as many bytes as the text
#     return int(keys // model.tokens_per_frame) + 1
# ```
#
# </details>

# %% [markdown]
# ## Bytes that nobody waits for
#
# A rank computes with one block while the next one travels. A hop costs the longer of the two:
#
# $$t_{hop} = \max(t_{compute},\ t_{wire}), \qquad
# t_{compute} = \frac{4\,B\,H\,s_Q\,s_{KV}\,D}{F}, \qquad t_{wire} = \frac{\text{bytes}}{W},$$
#
# with $F$ floating-point operations a second (two products of $2D$ operations for each pair of
# query and key) and $W$ bytes a second on the link. Divide the two:
#
# $$\text{ring: } \frac{t_{wire}}{t_{compute}} = \frac{H_{KV}\,e\,F}{2\,H\,W\,s_Q}, \qquad
# \text{lv-xattn: } \frac{t_{wire}}{t_{compute}} = \frac{(D e + (D+2) w)\,F}{4\,D\,W\,s_{KV}} .$$
#
# The block that travels cancels out; what counts is the length of what stays. **Ring Attention
# needs a long text to hide its keys; LV-XAttn needs a long video to hide its queries.** A long
# video is what there is.
#
# **Predict.** Twice as many frames: does Ring Attention wait for a larger, an equal or a smaller
# part of its time?
#
# <details><summary>Reasoning</summary>
#
# Equal. Its blocks are twice as long and take twice as long to work on; the video's length is not
# in its ratio.
#
# </details>

# %%
# Eight A30 on eight nodes, links of 10 Gbit/s: one of the clusters that the paper measures.
# Copies and the start of a call are left out, so that arithmetic, memory and links remain.
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
# `play` runs every rank's steps on the clocks of a machine of which only a few figures are known.
# On this cluster Ring Attention waits for nearly all of its time, at any length of the video.
#
# ### Exercise 3: how long must the text be?
#
# How many queries does *one rank* need, at least, so that Ring Attention hides its keys behind its
# arithmetic? Take $t_{wire} \le t_{compute}$ and bf16. A machine has `matmul` ($F$) and
# `between.bandwidth` ($W$).


# %% tags=["exercise"]
def queries_that_hide_the_ring(model, machine):
    """Return the least s_q with which a hop's keys travel no longer than its work takes."""
    raise NotImplementedError("queries_that_hide_the_ring is still to be written")


# %% tags=["check"]
with check("how many queries a rank needs to hide travelling keys"):
    fast = replace(slow, memory=1e30, between=Link(slow.between.bandwidth, 0))
    for model in (llama, MODELS["openflamingo-9b"]):
        s_q = queries_that_hide_the_ring(model, fast)
        assert s_q > 0, f"{model.name}: expected a number of queries, got {s_q}"
        waits = []
        for n in (0.9, 1.0, 1.1):
            layout = planned(*model.shapes(8 * round(n * s_q), 8000), 8, schedule="ring")
            played = play(layout, fast)
            waits.append(played.waiting / played.seconds)
        assert waits[0] > 0.01, f"{model.name}: fewer than {s_q} queries suffice: nothing waits"
        assert waits[2] < 0.01, f"{model.name}: with {s_q} queries it waits {waits[1]:.0%}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def queries_that_hide_the_ring(model, machine):
#     F, W = machine.matmul, machine.between.bandwidth
#     return int(model.kv_heads * 2 * F / (2 * model.heads * W)) + 1
# ```
#
# </details>

# %% [markdown]
# LV-XAttn asks the same of what stays with it. On this cluster a rank needs 120,038 keys of Llama
# 3-V to hide its queries, which is 19 frames; of a video of an hour it has 450.

# %%
e, w, F, W = 2, 4, slow.matmul, slow.between.bandwidth
enough = (D * e + (D + 2) * w) * F / (4 * D * W)  # keys of a rank with which lv-xattn's ratio is 1
assert round(enough) == 120_038 and 18 < enough / llama.tokens_per_frame < 19
assert 3600 / 8 == 450  # an hour, a frame a second, 8 ranks

# %% [markdown]
# ## The speed-up, redrawn
#
# **Predict.** If arithmetic took no time, how many times as fast as Ring Attention would LV-XAttn
# be? And if the network took none?
#
# <details><summary>Reasoning</summary>
#
# Without arithmetic only bytes count: the ratio of the bytes. Without a network nothing is left to
# gain: both do the same arithmetic.
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
# The speed-up follows the bytes until LV-XAttn hides all that it sends. From there on both take
# longer in proportion to the video, and the speed-up grows no more.

# %%
assert gain(MACHINES["a30-8"], 4096) > gain(MACHINES["a100-16"], 4096) > 5
three = [MACHINES[m] for m in ("a30-8", "a100-16", "h100")]
assert all(0.85 < gain(m, 1) < 1.1 and gain(m, 2) > 1.1 for m in three)

# %% tags=["hide-input"]
figure, axes = sheet(3.4)
lines = [("bytes of ring / bytes of lv-xattn", bytes_ratio, "--")]
for m in ("a30-8", "a100-16", "h100"):
    lines.append((f"on {m}", lambda f, m=m: gain(MACHINES[m], f), "-"))
for (name, of, style), colour in zip(lines, (INK, *COLOURS[:3]), strict=True):
    y = [of(f) for f in frames]
    axes.loglog(frames, y, style, color=colour, lw=2)
    axes.text(frames[-1], y[-1], f"  {name}", va="center", color=colour, size=10)
axes.axhline(1, color=INK, lw=0.8)
axes.set(xlabel="frames", ylabel="times as fast as ring", xlim=(1, 4096))
axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
figure

# %% [markdown]
# Dashed is what counting alone promises: the paper's elements per round, in the dtypes that travel.
# A cluster stays below it and comes to a plateau, which is the lower the faster its network is
# beside its arithmetic: 8 ranks are two hosts of `a100-16` with 25 GB/s between them, and a single
# host of `h100`, with NVLink. The break-even hardly moves: one frame is about even on all three.
#
# Over both lengths, for all schedules:

# %%
figure = winners(llama, MACHINES["a30-8"], 8, "bfloat16")
assert gain(slow, 1024, text=16) > 100 and gain(slow, 1, text=16384) < 0.5
assert 5514 / (2386 * llama.tokens_per_frame) < 1e-3 and gain(slow, 2386, text=5514) > 20
for text, shown, best in (
    (16, 1024, "gather"), (8192, 1024, "lv-xattn"), (16384, 4, "ulysses"), (16384, 1, "ring"),
):  # fmt: skip
    layout = planned(*llama.shapes(text, shown), 8)
    assert candidates(layout, MACHINES["a30-8"])[0].schedule == best
figure

# %% [markdown]
# Left, each number is the time of Ring Attention over that of LV-XAttn. Right, the fastest of the
# four. The averages that the paper gives for the Video-MME benchmark, 5,514 text tokens and 2,386
# frames, are at the upper edge, right of the middle. Long texts about short videos, the lower right
# corner, go to Ulysses and, in its last cell, to Ring Attention.
#
# ## When bytes do not decide
#
# While an answer is being written, one token at a time, there are hardly any queries. `lv-xattn`
# and `gather` send the same bytes then as ever. But a rank whose visitors come one after the other
# reads all of its keys from memory $P$ times; if they come at once, it reads them once.
#
# **Predict.** 16 queries on 16 ranks: which of the two is faster, and by how much?
#
# <details><summary>Reasoning</summary>
#
# Gather, by almost P = 16: with one query a block, reading the keys is all that takes time.
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
# With 2,048 queries it is the other way round: `gather` has to wait for everything before it can
# start, and `lv-xattn` hides its queries behind its arithmetic. `schedule="auto"` with a machine
# chooses by time, without one by bytes.
#
# ## What was shown
#
# - Queries are the smaller thing to move while the text is shorter than
#   $\frac{H_{KV}}{H}\frac{2De}{De + (D+1)w}$ of the video: a sixth, for Llama 3-V.
# - What travels can be hidden behind work on what stays: LV-XAttn's queries behind a long video,
#   Ring Attention's keys only behind a long text.
# - Bytes decide where the network is what everybody waits for; with very few queries `gather` sends
#   the same and is faster.
#
# Files: [src/lvxattn/plan/models.py](../src/lvxattn/plan/models.py),
# [steps.py](../src/lvxattn/plan/steps.py), [simulate.py](../src/lvxattn/plan/simulate.py),
# [choose.py](../src/lvxattn/plan/choose.py), [machine.py](../src/lvxattn/plan/machine.py),
# [memory.py](../src/lvxattn/plan/memory.py).
#
# Next: [notebook 3, the ring in one process](03_the_ring_in_one_process.ipynb).
