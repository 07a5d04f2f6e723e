"""The model in one process, and how far the ranks' results are from it.

Two right results differ by rounding, and by how much depends on the model.  So it is measured: one
process computes the model in its dtype, and in a wider one.  `FACTOR` times the difference is the
limit: both results are that far from the wider one, and maxima of few elements vary by as much.
Gradients that rounding changes so much that a factor of 2 would not be seen are not compared; among
them those of what is added to all keys, which a softmax does not see.
"""

from dataclasses import dataclass
from statistics import quantiles

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.work import Work
from lvxattn.torch_impl.group import Group

FACTOR, COARSE = 4.0, 0.25
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Parameters, and elements of each result, that are compared.
PARAMETERS, ELEMENTS = 64, 1 << 16
# Gradients that are single numbers, such as those of gates, are sums that may cancel: they are
# compared side by side, as one result.
SINGLE = "single numbers"


@dataclass(frozen=True)
class Sample:
    """Elements of a result, and the largest of all of them.

    Attributes
    ----------
    values : Tensor
        float64, on the CPU.
    largest : float
    count : int
        Of the elements that the result has.
    """

    values: Tensor
    largest: float
    count: int

    @staticmethod
    def of(x: Tensor) -> "Sample":
        """Sample a tensor evenly."""
        flat = x.detach().flatten()
        every = -(-flat.numel() // ELEMENTS)
        values = flat[::every].double().cpu()
        return Sample(values, float(flat.abs().max()), flat.numel())

    def error_of(self, got: "Sample") -> float:
        """Return the largest difference, relative to the largest element."""
        error = float((got.values - self.values).abs().max())
        if not error:
            return 0.0
        return error / self.largest if self.largest else float("inf")


Results = dict[str, Sample]


@dataclass(frozen=True)
class Expected:
    """The results of one process, and by how much rounding alone may change them.

    Attributes
    ----------
    results : dict of Sample
        ``logits``, and gradients by parameter.
    limits : dict of float
        Of the errors of those that are compared, and of the loss.
    losses : list of float
        Of all steps.
    tokens : list of int
    parameters : int
        How many have a gradient.
    """

    results: Results
    limits: dict[str, float]
    losses: list[float]
    tokens: list[int]
    parameters: int = 0


@dataclass(frozen=True)
class Check:
    """The comparison of one kind of result.

    Attributes
    ----------
    name : str
    compared, of : int
        Logits, losses, parameters with gradients, or tokens: how many were compared of how many.
    error, limit : float
        Where their ratio is largest.
    """

    name: str
    compared: int
    of: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return bool(self.error <= self.limit)


def sampled(model: nn.Module) -> list[str]:
    """Return the parameters whose gradients are compared, spread evenly over the model."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    count = min(PARAMETERS, len(names))
    return [names[n * len(names) // count] for n in range(count)]


def expect(work: Work, dtype: torch.dtype, *, steps: int, tokens: int) -> Expected:
    """Compute the results of one process.

    Parameters
    ----------
    work : Work
        The model alone, in `dtype`.
    dtype : torch.dtype
    steps : int
        Training steps, or 0.
    tokens : int
        To generate, instead; or 0.
    """
    if tokens:
        return Expected({}, {}, [], work.generate(tokens)[0].tolist())
    model, names = work.model, sampled(work.model)
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    for p in others:
        p.requires_grad_(False)  # their gradients would take memory
    outputs, _ = work.step(update=False)
    results, loss = results_of(outputs.logits, model, names), float(outputs.loss.detach())
    work.to(WIDER[dtype])
    outputs, _ = work.step(update=False)
    noise = {
        name: sample.error_of(results[name])
        for name, sample in results_of(outputs.logits, model, names).items()
    }
    work.to(dtype)
    for p in others:
        p.requires_grad_(True)
    losses = [float(work.step(update=True)[0].loss.detach()) for _ in range(steps)] or [loss]
    count = sum(p.requires_grad for p in model.parameters())
    return Expected(results, _limits(noise, results, loss, dtype), losses, [], count)


def _limits(
    noise: dict[str, float], results: Results, loss: float, dtype: torch.dtype
) -> dict[str, float]:
    """Return how far two right results may be apart."""
    least, of_logits = torch.finfo(dtype).eps, noise["logits"]
    logits = FACTOR * max(of_logits, least)
    # log sum exp(logits) - logit: each of the two changes by no more than a logit does, and both
    # they and their mean are rounded.
    of_loss = 2 * logits * results["logits"].largest / abs(loss) + 2 * least
    fine = {
        name: x for name, x in noise.items() if name != "logits" and not FACTOR * x > COARSE
    }  # NaN is in it, and fails
    # One gradient may be right by luck, but not most of them.
    usual = quantiles(fine.values(), n=10)[8] if len(fine) > 1 else 0.0
    gradients = {name: FACTOR * max(x, usual, least) for name, x in fine.items()}
    return {"logits": logits, "loss": of_loss, **gradients}


def results_of(logits: Tensor, model: nn.Module, names: list[str]) -> Results:
    """Return samples of the logits, and of the gradients of the named parameters."""
    found = [(name, p.grad) for name, p in model.named_parameters() if name in names]
    gradients = {name: grad for name, grad in found if grad is not None}
    single = [grad.flatten() for grad in gradients.values() if grad.numel() == 1]
    results = {name: Sample.of(grad) for name, grad in gradients.items() if grad.numel() > 1}
    if single:
        results[SINGLE] = Sample.of(torch.cat(single))
    return {"logits": Sample.of(logits), **results}


def compare(
    expected: Expected, results: Results, losses: list[float], tokens: list[int], group: Group
) -> list[Check]:
    """Compare all ranks' results with those of one process.

    Collective: every rank of the group calls this.

    Returns
    -------
    list of Check
        The same on all ranks: of the rank that is furthest off.
    """
    if expected.tokens:
        wrong = sum(a != b for a, b in zip(expected.tokens, tokens, strict=True))
        mine = [Check("tokens", len(tokens), len(tokens), wrong, 0.0)]
    else:
        want, limits = expected.results, expected.limits
        # A step begins with the errors of those before it.
        steps = [
            Check("loss", len(losses), len(losses), abs(got / right - 1), n * limits["loss"])
            for n, (got, right) in enumerate(zip(losses, expected.losses, strict=True), 1)
        ]
        compared = [name for name in want if name in limits and name != "logits"]
        count = sum(want[name].count if name == SINGLE else 1 for name in compared)
        gradients = [
            Check(
                "gradients", count, expected.parameters, _error(want, results, name), limits[name]
            )
            for name in compared
        ]
        sample = want["logits"]
        logits = _error(want, results, "logits")
        mine = [
            Check("logits", len(sample.values), sample.count, logits, limits["logits"]),
            max(steps, key=_error_over_limit),
            # Where rounding hides all, nothing is known to be right.
            max(
                gradients,
                key=_error_over_limit,
                default=Check("gradients", 0, 0, float("inf"), COARSE),
            ),
        ]
    return [max(found, key=_error_over_limit) for found in zip(*group.allgather(mine), strict=True)]


def _error(want: Results, got: Results, name: str) -> float:
    return want[name].error_of(got[name]) if name in got else float("inf")


def _error_over_limit(check: Check) -> float:
    ratio = check.error / check.limit if check.limit else check.error
    return ratio if ratio == ratio else float("inf")
