"""What a program runs on: MPI, or a process group of PyTorch, by what started it.

PyTorch's implementation is dressed as the others: NumPy arrays in and out, a backward to call.
"""

import os
import sys
from datetime import timedelta
from typing import Any

import numpy as np


def start(timeout: float = 60.0) -> tuple[Any, Any]:
    """Return the communicator of all ranks and the implementation that goes with it.

    Parameters
    ----------
    timeout : float
        Seconds, of the process group.
    """
    if "LVXATTN_TEST_STORE" not in os.environ:
        from mpi4py import MPI

        from lvxattn import mpi_impl

        return MPI.COMM_WORLD, mpi_impl
    import torch.distributed as dist

    from lvxattn.torch_impl.group import Group

    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['LVXATTN_TEST_STORE']}",
        rank=int(os.environ["LVXATTN_TEST_RANK"]),
        world_size=int(os.environ["LVXATTN_TEST_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )
    return Group.of(None), OnArrays()


def finish(comm: Any) -> None:
    """End what `start` started."""
    if "LVXATTN_TEST_STORE" in os.environ:
        import torch.distributed as dist

        # A rank that leaves while another still talks to it would be reported as broken.
        dist.barrier()
        dist.destroy_process_group()
        # What a program still holds, a mesh for one, keeps gloo's threads alive; when Python ends
        # PyTorch may then abort.  That is not what is tested here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def tensor(x: Any) -> Any:
    """Return a NumPy array as a tensor of its own; anything else as it is."""
    import torch

    if not isinstance(x, np.ndarray):
        return x
    x = np.array(x, order="K")
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(x: Any) -> Any:
    """Return a tensor as a NumPy array."""
    import torch

    x = x.detach()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


class OnArrays:
    """`lvxattn.torch_impl` on NumPy arrays, with a backward of its own as the others have it."""

    class Layout:
        """Agrees on arrays."""

        @staticmethod
        def agree(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
            from lvxattn.torch_impl import Layout

            return Layout.agree(*map(tensor, (q, k, v)), comm, **_tensors(options))

    def cross_attention(self, q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
        """Return out and lse."""
        from lvxattn import torch_impl

        given = map(tensor, (q, k, v))
        out, lse = torch_impl.cross_attention(*given, comm, return_lse=True, **_tensors(options))
        return array(out), array(lse)

    def cross_attention_backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, comm: Any, *,
        dlse: Any = None, gradients: str | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Return dq, dk and dv, as autograd finds them by way of another forward."""
        import torch

        from lvxattn import torch_impl

        wanted = [name in (gradients or "qkv") for name in "qkv"]
        given = [tensor(x).requires_grad_(w) for x, w in zip((q, k, v), wanted, strict=True)]
        results = torch_impl.cross_attention(*given, comm, return_lse=True, **_tensors(options))
        # Where a row is dead, lse is -inf: its gradient must be 0 whatever comes from above.
        douts = [tensor(dout), torch.zeros_like(results[1])]
        if dlse is not None:
            douts[1] = tensor(dlse).to(results[1].dtype)
        leaves = [x for x, w in zip(given, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(results, leaves, douts))
        return tuple(array(next(found)) if w else None for w in wanted)

    def cross_attention_layer(self, q: Any, y: Any, make_kv: Any, comm: Any) -> Any:
        """Return out; y is what make_kv takes, as it is."""
        from lvxattn import torch_impl

        def make_tensors(y: Any) -> Any:
            made = make_kv(y)
            return tuple(map(tensor, made)) if isinstance(made, tuple) else made

        given = make_tensors if callable(make_kv) else make_kv
        return array(torch_impl.cross_attention_layer(tensor(q), y, given, comm))

    def unshard(self, x: Any, comm: Any, axis: int = 2) -> Any:
        """Join all ranks' parts."""
        from lvxattn.torch_impl import unshard

        return array(unshard(tensor(x), comm, axis))


def _tensors(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor(x) if name == "mask" else x for name, x in options.items()}
