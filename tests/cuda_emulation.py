"""CuPy's `RawModule` for fake_cupy: g++ compiles the source, and fibers run it on the CPU.

    emulator = Emulator(folder)
    emulator.install(monkeypatch)

A kernel waits in the fake stream like any other work.  What it is given is passed on as CuPy does:
arrays by address, NumPy's numbers by their bytes, anything else refused.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lvxattn.mpi_impl.kernels import build, cuda
from tests import fake_cupy

HEADER = Path(__file__).with_name("cuda_emulation.h")
# cudaDeviceGetAttribute's: the shared memory of an A100, and so few multiprocessors that some
# blocks are split and some are not.
MOST_SHARED, PROCESSORS = 97, 16
ATTRIBUTES = {MOST_SHARED: 163 * 1024, PROCESSORS: 2}
# How blocks run.
LAST_WARP_FIRST, EAGER_COPIES = 1, 2
SOME_WAYS = (0, LAST_WARP_FIRST, EAGER_COPIES, LAST_WARP_FIRST | EAGER_COPIES)


class Emulator:
    """Compiles into a folder.

    Attributes
    ----------
    how : int
        One of `SOME_WAYS` in which blocks run.
    edit : callable
        Changes the source before it is compiled.
    launches : list
        Names and grids of what was launched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.how = 0
        self.edit: Callable[[str], str] = lambda text: text
        self.launches: list[tuple[str, tuple[int, ...]]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make fake_cupy compile and run kernels here."""
        runtime = dict(vars(getattr(fake_cupy.cuda, "runtime", SimpleNamespace())))
        runtime["deviceGetAttribute"] = lambda attribute, device: ATTRIBUTES[attribute]
        monkeypatch.setattr(fake_cupy.cuda, "runtime", SimpleNamespace(**runtime), raising=False)
        monkeypatch.setattr(fake_cupy, "RawModule", self, raising=False)
        monkeypatch.setattr(fake_cupy.Device, "compute_capability", "80")
        cuda.forget()

    def __call__(self, code: str, options: tuple[str, ...]) -> "Module":
        assert code == build.source()
        return Module(self, self.compile(options))

    def compile(self, options: tuple[str, ...]) -> ctypes.CDLL:
        """Return the library, compiled once per folder."""
        parts = [f'#include "{HEADER}"', build.source("tile.cuh", "attention.cu")]
        parts += [f"LAUNCHER({name})" for name in build.KERNELS]
        text = self.edit("\n".join(parts))
        command = [
            "g++", *options, "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-x", "c++",
            "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
        ]  # fmt: skip
        known = hashlib.sha256((text + HEADER.read_text() + str(command)).encode()).hexdigest()
        library = self.folder / f"{known[:16]}.so"
        if not library.exists():
            done = subprocess.run(
                [*command, "-", "-o", str(library)], input=text, text=True, capture_output=True
            )
            assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))


class Module:
    """A compiled source."""

    def __init__(self, emulator: Emulator, library: ctypes.CDLL) -> None:
        self.emulator, self.library = emulator, library

    def get_function(self, name: str) -> "Kernel":
        return Kernel(self, name)


class Kernel:
    """One of its kernels."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.run = getattr(module.library, f"launch_{name}")
        self.run.restype = None
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.kinds = _kinds(name)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
        shared_mem: int = 0,
    ) -> None:  # fmt: skip
        assert block[1:] == (1, 1)
        assert shared_mem <= self.max_dynamic_shared_size_bytes <= ATTRIBUTES[MOST_SHARED]
        assert max(grid[1:]) <= 65535
        given = [_bytes(x) for x in args]
        assert [kind for kind, _ in given] == self.kinds  # the device would not notice
        emulator, keep = self.module.emulator, args
        emulator.launches.append((self.name, grid))

        def work() -> None:
            values = [np.frombuffer(value, np.uint8) for _, value in given]
            pointers = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
            self.run((ctypes.c_int * 3)(*grid), block[0], shared_mem, pointers, emulator.how)
            assert keep

        fake_cupy.cuda.get_current_stream().launch(work)


def _bytes(x: Any) -> tuple[str, bytes]:
    if isinstance(x, fake_cupy.ndarray):
        return "*", np.uint64(x.memory.ctypes.data).tobytes()
    assert isinstance(x, np.generic), type(x)  # Python's own numbers would be 8 bytes long
    return x.dtype.name, x.tobytes()


def _kinds(name: str) -> list[str]:
    """Return the types of the kernel's arguments, from its declaration in the source."""
    source = build.source("attention.cu")
    found = re.search(rf"\n{name}\((.*?)\) \{{", source, re.DOTALL)
    assert found
    names = {"int": "int32", "long long": "int64", "float": "float32"}
    declared = [" ".join(x.split()) for x in found[1].split(",")]
    return ["*" if "*" in x else names[x.rsplit(" ", 1)[0]] for x in declared]
