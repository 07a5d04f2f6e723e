"""Ranks of torch.distributed in a notebook: a cell that begins with ``%%torch 2`` runs on two.

    %load_ext torch_cell

    %%torch 2 --give total
    import torch.distributed as dist
    total = 1 + dist.get_rank()

It is to PyTorch what ``%%mpi`` is to MPI.  To import PyTorch and transformers takes ten seconds of
processor time, so one process does it, in the background, and ranks are its forks: from then on a
cell starts in a moment.  Each cell has new ranks, gloo is initialised, and the number of threads is
1.  A rank ends with that process, and that process with the notebook.
"""

import argparse
import atexit
import json
import linecache
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lvxattn.common.processes import end_with_parent

SECONDS = 60.0  # time limit of a cell
GRACE = 1.0  # seconds that the others have when a rank has failed
MOST = 16  # ranks
NEEDED = "torch", "transformers"


class RanksError(RuntimeError):
    """A cell failed; the message is a rank's traceback, or says that the time was up."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the ranks' failure, without the notebook's own frames."""
        return [f"RanksError: {self}"]


def load_ipython_extension(shell: Any) -> None:
    """Register the magic, and begin to import what ranks need; ``%load_ext`` calls this."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed: pip install '.[models]'")
    shell.register_magic_function(lambda line, cell: _magic(shell.user_ns, line, cell), "cell",
                                  "torch")  # fmt: skip
    _forks()


def run(
    source: str, ranks: int, *, take: Any = (), give: Any = (), seconds: float = SECONDS
) -> tuple[list[str], dict[str, Any]]:
    """Run Python source on new ranks.

    Parameters
    ----------
    source : str
    ranks : int
    take : dict
        Variables for every rank; they are pickled.
    give : sequence of str
        Names of variables of rank 0 to return; they are pickled.
    seconds : float
        Ranks that take longer are killed.

    Returns
    -------
    printed : list of str
        What each rank has printed.
    given : dict

    Raises
    ------
    RanksError
        A rank raised, or the time was up.
    ValueError
        More than `MOST` ranks, or none.
    """
    if not 1 <= ranks <= MOST:
        raise ValueError(f"ranks: expected 1 to {MOST}, got {ranks}")
    with tempfile.TemporaryDirectory(prefix="torch-cell-") as name:
        folder = Path(name)
        (folder / "take").write_bytes(pickle.dumps(dict(take)))
        request = {"source": source, "folder": name, "ranks": ranks, "give": list(give)}
        statuses = _ask({**request, "seconds": seconds})
        raised = sorted(folder.glob("raised.*"), key=lambda path: path.stat().st_mtime_ns)
        if raised:
            raise RanksError(f"rank {raised[0].suffix[1:]} of {ranks}\n{raised[0].read_text()}")
        if None in statuses:
            raise RanksError(f"not done after {seconds:g} s, ended")
        if any(statuses):
            raise RanksError(f"the ranks ended with status {statuses}")
        printed = [(folder / f"printed.{rank}").read_text() for rank in range(ranks)]
        return printed, pickle.loads((folder / "give").read_bytes())


def _magic(space: dict[str, Any], line: str, cell: str) -> None:
    parser = argparse.ArgumentParser("%%torch", add_help=False, exit_on_error=False)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--give", type=lambda names: names.split(","), default=[])
    options = parser.parse_args(shlex.split(line))
    for name in options.give:
        space.pop(name, None)  # a cell that fails must not leave old values
    printed, given = run(cell, options.ranks, give=options.give)
    for rank, text in enumerate(printed):
        for row in text.splitlines():
            print(f"rank {rank} | {row}")
    space.update(given)


# The process whose forks are the ranks.
_running: list["subprocess.Popen[str]"] = []


def _forks() -> "subprocess.Popen[str]":
    """Return the process that forks; start it if there is none."""
    if _running and _running[0].poll() is None:
        return _running[0]
    _running[:] = [
        subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    ]  # fmt: skip
    return _running[0]


def _ask(request: dict[str, Any]) -> list[int | None]:
    """Return the ranks' exit statuses; None for one that was killed because the time was up."""
    forks = _forks()
    assert forks.stdin is not None
    assert forks.stdout is not None
    assert forks.stderr is not None
    try:
        with suppress(BrokenPipeError):
            forks.stdin.write(json.dumps(request) + "\n")
            forks.stdin.flush()
        answer = forks.stdout.readline()
    except BaseException:  # interrupted: all ranks are of its group
        _end()
        raise
    if not answer:
        raise RanksError(f"no rank was started\n{forks.stderr.read()[-2000:]}")
    statuses: list[int | None] = json.loads(answer)
    return statuses


@atexit.register
def _end() -> None:
    """End the process that forks, and its ranks."""
    for forks in _running:
        with suppress(ProcessLookupError):
            os.killpg(forks.pid, signal.SIGKILL)
        for pipe in (forks.stdin, forks.stdout, forks.stderr):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        forks.wait()
    _running.clear()


# What follows runs in the other processes.


def _serve() -> None:
    """Answer each line of the input with the statuses of the ranks that it asks for."""
    for line in sys.stdin:
        request = json.loads(line)
        parent = os.getpid()
        pids = []
        for rank in range(request["ranks"]):
            if not (pid := os.fork()):
                end_with_parent(parent)
                _rank(request, rank)
            pids.append(pid)
        print(json.dumps(ends(pids, request["seconds"], GRACE)), flush=True)


def ends(pids: list[int], seconds: float, grace: float) -> list[int | None]:
    """Wait for ranks, and kill those that are late; return exit statuses.

    Parameters
    ----------
    pids : list of int
        Children of this process.
    seconds : float
        Time limit.
    grace : float
        Seconds that the others have when a rank has failed.

    Returns
    -------
    list of int or None
        None for a rank that was killed though none had failed.
    """
    statuses: dict[int, int | None] = {}
    limit, late = time.monotonic() + seconds, False
    while len(statuses) < len(pids):
        running = [pid for pid in pids if pid not in statuses]
        if time.monotonic() > limit:
            late = not any(statuses.values())
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        for pid in running:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = None if late else os.waitstatus_to_exitcode(status)
                if status:
                    limit = min(limit, time.monotonic() + grace)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def _rank(request: dict[str, Any], rank: int) -> None:
    """Be a rank: run the source, and end."""
    import torch.distributed as dist

    folder, status = Path(request["folder"]), 1
    with open(os.devnull) as nothing, open(folder / f"printed.{rank}", "w") as said:
        for fd, file in enumerate((nothing, said, said)):
            os.dup2(file.fileno(), fd)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - not what is left of the requests
    source = request["source"]
    linecache.cache["cell"] = (len(source), None, source.splitlines(True), "cell")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank,
            world_size=request["ranks"], timeout=timedelta(seconds=request["seconds"]),
        )  # fmt: skip
        dist.barrier()  # a rank that ends at once would fail those that still connect to it
        space = {"__name__": "__main__", **pickle.loads((folder / "take").read_bytes())}
        exec(compile(source, "cell", "exec"), space)
        dist.barrier()
        if rank == 0:
            (folder / "give").write_bytes(pickle.dumps({n: space[n] for n in request["give"]}))
        status = 0
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        first = next((n for n, x in enumerate(frames) if x.filename == "cell"), len(frames))
        told = [*traceback.format_list(frames[first:]), *traceback.format_exception_only(error)]
        (folder / f"raised.{rank}").write_text("".join(told))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what a cell still holds may keep gloo's threads alive


def _import() -> None:
    """Import what cells need."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, as they are imported
        import torch
        import torch.distributed.device_mesh
        import transformers
        from transformers import MllamaForConditionalGeneration  # noqa: F401

        import lvxattn.torch_impl.commands.model.kinds
        import lvxattn.torch_impl.models  # noqa: F401
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    _import()
    _serve()
