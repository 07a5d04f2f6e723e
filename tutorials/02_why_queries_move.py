# %% [markdown]
# # 2. Why queries move
#
# You will learn to compute what every schedule sends for a given model, without a cluster; when
# Ring Attention is the better choice; and what a faster network changes.
#
# Prerequisites: [notebook 1](01_merging_softmax.ipynb) for `(out, lse)`. Time: about 25 minutes.
#
# A *rank* is one process with its own memory, typically one GPU. There are $P$ ranks, which
# exchange data by messages. A *schedule* determines what is sent to which rank, and when.

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
# ## Four schedules
#
# | schedule | what moves | size of one message |
# |---|---|---|
# | `lv-xattn` | queries, round a ring; their results follow | $\sim s_Q$ |
# | `gather` | queries, by all-gather; results directly to their owners | $\sim s_Q$ |
# | `ring` | keys and values, round a ring | $\sim s_{KV}$ |
# | `ulysses` | everything, by all-to-all: each rank gets $H/P$ heads | $\sim (s_Q + s_{KV})/P$ |
#
# `ring` is Ring Attention ([arXiv:2310.01889](https://arxiv.org/abs/2310.01889)) and `ulysses`
# DeepSpeed-Ulysses ([arXiv:2309.14509](https://arxiv.org/abs/2309.14509)).
#
# In each schedule a rank sends $P - 1$ messages of a kind. LV-XAttn has two kinds in the forward
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
assert [round(sizes["ring"] / sizes["lv-xattn"]) for sizes in bars.values()] == [619, 40, 24]
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


# %% tags=["check"]
with check("the bytes of both schedules are those of the plan"):
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
# same amount if
#
# $$H\,S_Q\,\bigl(D\,e + (D + 2)\,w\bigr) = H_{KV}\,S_{KV}\,2D\,e .$$
#
# $B$ and $P$ cancel. The ratio of the lengths is then
#
# $$\frac{S_Q}{S_{KV}} = \frac{H_{KV}}{H}\cdot\frac{2D\,e}{D\,e + (D + 2)\,w} .$$
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

# %% [markdown]
# At exactly this ratio the plan counts equal bytes; with 8 queries fewer `lv-xattn` sends less,
# with 8 more it sends more. So for Llama 3-V queries should move as long as the text has less than
# about a sixth of the tokens of the video. As a function of the length of the video:

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
axes.set(xlabel="frames", ylabel="megabytes sent by a rank", xlim=(1, 4096))
axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
axes.set_yticks([1, 100, 10_000], ["1", "100", "10,000"])
figure

# %% [markdown]
# The bytes of `lv-xattn` do not depend on the video. For Llama 3-V the lines cross between one
# frame and two; for OpenFlamingo, with 64 tokens per frame, at 49.
#
# ### Exercise 2: the break-even in frames
#
# What is the least number of frames for which `lv-xattn` sends fewer bytes than `ring` in the
# forward? Use the equation, in bf16 ($e = 2$, $w = 4$); a model has `heads`, `kv_heads`, `head_dim`
# and `tokens_per_frame`.


# %% tags=["exercise"]
def frames_from_which_queries_move(model, text):
    """Return the least number of frames for which lv-xattn sends fewer bytes than ring."""
    raise NotImplementedError("frames_from_which_queries_move is not implemented")


# %% tags=["check"]
with check("the least number of frames for which queries should move"):
    for model in MODELS.values():
        got = frames_from_which_queries_move(model, 4096)
        assert isinstance(got, int), f"{model.name}: expected an int, got {got!r}"
        for f, fewer in ((got - 1, False), (got, True)):
            lv, ring = (sends(model, 4096, f, 1024, s) for s in ("lv-xattn", "ring"))
            says = f"{model.name}: with {f} frames lv-xattn sends {lv} bytes and ring {ring}"
            assert (lv < ring) == fewer, f"{says}, got {got}"

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
# query and key) and $W$ bytes per second on the link. Their ratio is
#
# $$\text{ring: } \frac{t_{wire}}{t_{compute}} = \frac{H_{KV}\,e\,F}{2\,H\,W\,s_Q}, \qquad
# \text{lv-xattn: } \frac{t_{wire}}{t_{compute}} = \frac{(D e + (D+2) w)\,F}{4\,D\,W\,s_{KV}} .$$
#
# The length of the block that travels cancels; only the length of what stays is left. **Ring
# Attention needs a long text to hide its keys; LV-XAttn needs a long video to hide its queries.**
# Here the video is long.
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
# arithmetic ($t_{wire} \le t_{compute}$)? Use bf16. A machine has `matmul` ($F$) and
# `between.bandwidth` ($W$).


# %% tags=["exercise"]
def queries_that_hide_the_ring(model, machine):
    """Return the least s_q for which a hop's keys take no longer to send than to compute with."""
    raise NotImplementedError("queries_that_hide_the_ring is not implemented")


# %% tags=["check"]
with check("with so many queries a rank hides the keys that travel"):
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
# For LV-XAttn the same condition holds for the keys. On this cluster a rank needs 120,038 keys of
# Llama 3-V to hide its queries, which is 19 frames; of a video of one hour each rank has 450.

# %%
e, w, F, W = 2, 4, slow.matmul, slow.between.bandwidth
enough = (D * e + (D + 2) * w) * F / (4 * D * W)  # keys of a rank for which lv-xattn's ratio is 1
assert round(enough) == 120_038 and 18 < enough / llama.tokens_per_frame < 19
assert 3600 / 8 == 450  # an hour, a frame a second, 8 ranks

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
# The dashed line is the ratio of bytes: the paper's elements per round, in the dtypes that travel.
# Clusters stay below it and reach a plateau, which is lower for a faster network relative to
# arithmetic: 8 ranks are two hosts of `a100-16` with 25 GB/s between them, and a single host of
# `h100`, with NVLink. The break-even is about one frame on all three.
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
# Left: the time of Ring Attention over that of LV-XAttn. Right: the fastest of the four schedules.
# The averages that the paper gives for the Video-MME benchmark, 5,514 text tokens and 2,386 frames,
# are at the upper edge, right of the middle. For long texts about short videos, in the lower right
# corner, Ulysses is fastest and, in the last cell, Ring Attention.
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
# - Moving queries sends fewer bytes as long as the text is shorter than
#   $\frac{H_{KV}}{H}\frac{2De}{De + (D+2)w}$ of the video: a sixth, for Llama 3-V.
# - Communication can be hidden behind computing with what stays: LV-XAttn's queries behind a long
#   video, Ring Attention's keys only behind a long text.
# - Bytes determine the time if the network is the bottleneck; with very few queries `gather` sends
#   the same bytes as `lv-xattn` and is faster.
#
# Files: [src/lvxattn/plan/models.py](../src/lvxattn/plan/models.py),
# [steps.py](../src/lvxattn/plan/steps.py), [simulate.py](../src/lvxattn/plan/simulate.py),
# [choose.py](../src/lvxattn/plan/choose.py), [machine.py](../src/lvxattn/plan/machine.py),
# [memory.py](../src/lvxattn/plan/memory.py).
#
# Next: [notebook 3, the ring in one process](03_the_ring_in_one_process.ipynb).
