"""PyTorch: compiled flex_attention on CPUs is wrong for some numbers of keys.

    python pytorch_flex_compiled_cpu.py [--static]

It needs PyTorch and a C++ compiler, and most of a minute for each compilation: one for all sizes,
or with --static one for each.
"""

import sys

import torch
from torch.nn.attention.flex_attention import flex_attention

H, S_Q, D = 4, 32, 8


def main():
    """Print the relative error of out by head, three times for each number of keys."""
    torch.manual_seed(0)
    static = "--static" in sys.argv
    compiled = torch.compile(flex_attention, dynamic=not static)
    for S_KV in (40, 64) if static else (8, 16, 24, 32, 36, 40, 48, 56, 64, 72, 97, 128, 200, 256):
        q, k, v = (torch.randn(1, H, S, D) for S in (S_Q, S_KV, S_KV))
        expected = torch.softmax(q @ k.mT * D**-0.5, -1) @ v
        for _ in range(3):
            errors = (compiled(q, k, v) - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3))
            print(f"{S_KV:4} keys, by head:", *(f"{error:.0e}" for error in errors[0]), flush=True)


if __name__ == "__main__":
    main()
