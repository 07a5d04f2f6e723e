"""One step of training, and one look at images that training never sees.

Each rank answers its own questions from all ranks' frames.  Its loss is its share of the batch's:

    loss = sum over its questions of -log p(answer) / all ranks' questions

so that the sum of all ranks' gradients is the gradient of one process that holds everything, and
AdamW, which is given the same sum everywhere, takes the same step everywhere.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from lvxattn.common.meter import Meter
from lvxattn.torch_impl.commands.train.data import Clips
from lvxattn.torch_impl.commands.train.model import Finder
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.module import sum_gradients

_DECAY, _BETAS, _LONGEST = 0.3, (0.9, 0.99), 1.0
"""AdamW's weight decay and betas, and the longest gradient that it is given."""


def make_optimizer(model: Finder) -> torch.optim.AdamW:
    """Return AdamW; the learning rate is set anew for every step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=_BETAS, weight_decay=_DECAY)


def train_step(
    model: Finder,
    optimizer: torch.optim.AdamW,
    clips: Clips,
    rate: float,
    told: Sequence[bool] = (),
) -> tuple[float, float, list[bool]]:
    """Learn from one batch.

    Collective: every rank of the model's group calls this.

    Parameters
    ----------
    model : Finder
    optimizer : torch.optim.AdamW
    clips : Clips
        This rank's part.
    rate : float
        The learning rate.
    told : sequence of bool
        What this rank has been told, such as to stop; equally many on all ranks.

    Returns
    -------
    loss, accuracy : float
        Before the step, over all ranks' questions.
    told : list of bool
        What any rank has been told; the same on all ranks.
    """
    loss, right = answer(model, clips)
    optimizer.zero_grad()
    loss.backward()
    # 1. Until here gradients are this rank's part; from here on they are the same everywhere.
    sum_gradients(model, model.group)
    clip_grad_norm_(model.parameters(), _LONGEST)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.step()
    # 2. What is to be told travels in one message.
    whole, found, *ranks = add_up([float(loss.detach()), right, *map(float, told)], model.group)
    return whole, found / questions(clips), [n > 0 for n in ranks]


def answer(model: Finder, clips: Clips, *, meter: Meter | None = None) -> tuple[Tensor, float]:
    """Return this rank's share of the loss, and how many of its questions it answers right.

    Collective: every rank of the model's group calls this.
    """
    scores = model(clips, meter=meter)
    total = cross_entropy(scores.flatten(0, 1), clips.answers.flatten(), reduction="sum")
    return total / questions(clips), float((scores.argmax(-1) == clips.answers).sum())


def questions(clips: Clips) -> int:
    """Return how many questions all ranks have together."""
    B, _, S_Q = clips.shape
    return B * S_Q


@torch.no_grad()
def look(model: Finder, clips: Clips) -> float:
    """Return the share of right answers, over all ranks' questions.

    Collective: every rank of the model's group calls this.
    """
    _, right = answer(model, clips)
    return add_up([right], model.group)[0] / questions(clips)


def add_up(numbers: list[float], group: Group) -> list[float]:
    """Add up numbers over the ranks.  Collective: every rank of the group calls this."""
    if group.size == 1:
        return numbers
    summed = torch.tensor(numbers, dtype=torch.float64)
    with group.waiting(lambda: "all ranks' losses"):
        dist.all_reduce(summed, dist.ReduceOp.SUM, group.group)
    return list(summed.tolist())
