"""The command ``model``, top-down: build, distribute, run, check, report.

Every rank builds the whole model; rank 0 first runs it alone, if that is to be compared.
"""

import socket
import sys
import warnings
from argparse import Namespace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lvxattn.cli.arguments import UsageError, check_output, refuse
from lvxattn.cli.run_ranks import check_room, on_rank_0, together
from lvxattn.cli.run_report import write_json
from lvxattn.cli.tensors import InputError
from lvxattn.common.handshake import SCHEDULES
from lvxattn.torch_impl.commands.model.check import Expected, compare, expect, results_of, sampled
from lvxattn.torch_impl.commands.model.kinds import (
    KINDS,
    SIZES,
    checkpoint_model,
    least_nbytes,
    random_model,
)
from lvxattn.torch_impl.commands.model.options import contradiction
from lvxattn.torch_impl.commands.model.report import print_report, report_of
from lvxattn.torch_impl.commands.model.work import Work, cast, forget_peak, peak
from lvxattn.torch_impl.commands.run import TorchRanks
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.models import distribute

_NAME = "lvxattn model"
# The share of weights that have gradients, in the models that have fewest.
REACHED = 0.9


def run_model(options: Namespace, group: Group) -> int:
    """Run a model on the ranks of a group.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As `options.add_options` defines it.
    group : Group

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.
    """
    wrong = contradiction(options)
    if wrong:
        raise UsageError(f"{_NAME}: error: {wrong} (on all ranks)")
    try:
        passed = _run(options, TorchRanks(group))
    except InputError as error:
        return refuse(f"{_NAME}: error: {error}", group.rank)
    if not passed and group.rank == 0:
        print(f"{_NAME}: a check failed", file=sys.stderr, flush=True)
    return 0 if passed else 1


def _run(options: Namespace, ranks: TorchRanks) -> bool:
    """Return whether all checks passed; raise InputError on all ranks together."""
    ranks.limit_threads()
    together(lambda: _check_packages(options), ranks)
    on_rank_0(lambda: _check_json(options), ranks)
    backend = ranks.backend(options.device, options.dtype)
    device = backend.where
    memory = check_room(
        together(lambda: _least_nbytes(options, device), ranks), ranks,
        "give a smaller --size or fewer --frames, or use fewer ranks a host",
    )  # fmt: skip
    # 1. Rank 0 alone, if that is to be compared with.
    expected = on_rank_0(lambda: _alone(options, device), ranks) if options.check else None
    # 2. Every rank has the whole model and batch, and takes its share.
    model, batch = together(lambda: _build(options, device), ranks)
    _check_equal(model, ranks)
    try:
        spread = distribute(
            model, backend.group, text=options.text, schedule=options.schedule or SCHEDULES[0],
            recompute_kv=not options.keep_kv,
        )  # fmt: skip
        batch = spread.inputs(**batch)
    except ValueError as error:  # the same on all ranks
        raise InputError(str(error)) from None
    work = Work(model, KINDS[options.model], batch, device, spread, backend.finish)
    if ranks.rank == 0 and options.json != "-":
        print(f"memory: at least {memory}", flush=True)
    # 3. Passes, training steps, or tokens.
    forget_peak(device)
    costs, losses, tokens, results = [], [], [], {}
    if options.generate:
        ids, cost = work.generate(options.generate)
        tokens, costs = ids.tolist(), [cost]
    for n in range(0 if options.generate else options.train_steps or 1):
        try:
            outputs, cost = work.step(update=bool(options.train_steps))
        except ValueError as error:
            if str(error).startswith("schedule:"):  # does not support the model: on all ranks
                raise InputError(str(error)) from None
            raise
        costs.append(cost)
        loss, logits = float(outputs.loss.detach()), outputs.logits.detach()
        if options.text == "sharded":  # each rank has its rows
            loss = sum(ranks.allgather(loss)) / ranks.size
        losses.append(loss)
        if n == 0 and expected is not None:
            if options.text == "sharded":
                logits = torch.cat(ranks.allgather(logits.cpu()), dim=1)
            results = results_of(logits, model, sampled(model))
        if options.train_steps and ranks.rank == 0 and options.json != "-":
            print(f"  step {n + 1:>5}   loss {losses[-1]:.6f}", flush=True)
    facts = {
        "rank": ranks.rank, "host": socket.gethostname(), "device": backend.device,
        "peak": peak(device),
    }  # fmt: skip
    # 4. The same in one process; rank 0 reports.
    checks = compare(expected, results, losses, tokens, ranks.group) if expected else []
    by_rank = ranks.allgather((facts, costs))
    parameters = sum(p.numel() for p in model.parameters())
    report = report_of(options, parameters, losses, tokens, by_rank, checks)
    if ranks.rank == 0 and options.json != "-":
        print_report(report)
    on_rank_0(lambda: write_json(report, options.json) if options.json else None, ranks)
    return all(check.passed for check in checks)


def _check_packages(options: Namespace) -> None:
    for package, extra in (("transformers", "'.[models]'"), (KINDS[options.model].package, "")):
        if not find_spec(package):
            what = extra or "--no-deps open-flamingo einops einops-exts"
            raise InputError(f"--model: {package} is not installed: pip install {what}")
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # of packages that are older than transformers


def _check_json(options: Namespace) -> None:
    if options.json not in (None, "-"):
        check_output("--json", options.json)


def _least_nbytes(options: Namespace, device: torch.device) -> int:
    """Return how many bytes of its host a rank needs at least: for the batch, and the weights."""
    dtype, sizes = getattr(torch, options.dtype), (options.frames, options.text_tokens)
    kind = KINDS[options.model]
    weights, batch = least_nbytes(kind, options.size, options.weights, dtype, sizes)
    if device.type != "cpu":
        return batch
    # Gradients, and the two averages of AdamW.
    copies = 0 if options.generate else 3 if options.train_steps else 1
    own = 0 if options.weights else weights  # those of files are mapped, and shared
    return batch + own + int(copies * REACHED * weights)


def _build(options: Namespace, device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the whole model, on the device, and the whole batch, on the CPU."""
    kind, frames, text_tokens = KINDS[options.model], options.frames, options.text_tokens
    dtype, before = getattr(torch, options.dtype), torch.get_default_dtype()
    if options.weights is not None:
        model = checkpoint_model(kind, options.weights, dtype).to(device)
    else:
        torch.set_default_dtype(dtype)
        try:
            with device:
                size = options.size or SIZES[0]
                model = random_model(kind, size, frames, text_tokens, options.seed)
        finally:
            torch.set_default_dtype(before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        batch = cast(kind.batch(model, frames, text_tokens), dtype)
    # Dropout is off: ranks would not drop what one process drops.
    return model.eval(), batch


def _alone(options: Namespace, device: torch.device) -> Expected:
    """Return what one process computes, with the same weights."""
    model, batch = _build(options, device)
    work = Work(model, KINDS[options.model], batch, device)
    steps, tokens = options.train_steps or 0, options.generate or 0
    return expect(work, getattr(torch, options.dtype), steps=steps, tokens=tokens)


def _check_equal(model: nn.Module, ranks: TorchRanks) -> None:
    """Raise InputError if the ranks have different weights, as of different folders."""
    mine = [p.detach().flatten()[:: max(1, p.numel() // 16)].tolist() for p in model.parameters()]
    for rank, other in enumerate(ranks.allgather(mine)):
        if other != mine:
            raise InputError(f"the weights differ between ranks 0 and {rank} (on all ranks)")
