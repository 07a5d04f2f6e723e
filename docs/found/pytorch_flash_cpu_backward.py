"""PyTorch: gradients of SDPA on CPUs through a row that a number like -1e9 hides entirely.

python pytorch_flash_cpu_backward.py
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print(torch.__version__)
torch.manual_seed(0)
q, k, v, dout = (torch.randn(1, 1, 16, 8) for _ in range(4))
for number in (-1e4, -1e9, torch.finfo(torch.float32).min):
    mask = torch.zeros(1, 1, 16, 16)
    mask[:, :, 3] = number  # a padding query: every key gets the same bias
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    s = wide[0] @ wide[1].mT * 8**-0.5
    # Scores of that row are lost beside the number, but for -1e4; their derivatives are not.
    s = s + mask if number == -1e4 else torch.where(mask < 0, mask + s - s.detach(), s)
    wanted = torch.autograd.grad(torch.softmax(s, -1) @ wide[2], wide, dout.double())
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, attn_mask=mask)
        found = torch.autograd.grad(out, leaves, dout)
        errors = (float((g - w).norm() / w.norm()) for g, w in zip(found, wanted, strict=True))
        line = ", ".join(f"{n} {e:.1e}" for n, e in zip(("dq", "dk", "dv"), errors, strict=True))
        print(f"row hidden by {number:.3g}, {backend.name}: {line}")
