"""Print the host, and which of its GPUs `use_device` takes; there need be none."""

import os
from types import SimpleNamespace

from mpi4py import MPI

from lvxattn.mpi_impl import use_device

visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")  # CUDA numbers these from 0
runtime = SimpleNamespace(getDeviceCount=lambda: len(visible))
cuda = SimpleNamespace(runtime=runtime, Device=lambda _: SimpleNamespace(use=lambda: None))
number = use_device(MPI.COMM_WORLD, SimpleNamespace(cuda=cuda))
print(f"{MPI.Get_processor_name()} {visible[number]}\n", end="", flush=True)
