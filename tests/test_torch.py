"""torch_impl on the ranks of a process group: all ways of calling it."""

import pytest
import torch

from lvxattn.torch_impl import CrossAttention, Layout, cross_attention, shard, unshard
from tests.launch import checks_of
from tests.torch_ranks import torch_report

pytestmark = pytest.mark.mpi


OF_ANY = tuple(checks_of("torch_calls.py"))
# Four ranks are two rings of two; the rest is no different from three.
OF_FOUR = ("groups_and_meshes_beside_one_another", "equals_sdpa_on_gathered_tensors")
LAUNCHES = [(1, OF_ANY), (3, OF_ANY), (4, OF_FOUR)]
CALLS = [(P, launch, check) for P, launch in LAUNCHES for check in launch]


@pytest.mark.parametrize(
    ("P", "launch", "check"),
    [
        *(pytest.param(*call, id=f"{call[0]}-{call[2]}") for call in CALLS),
        *(pytest.param(2, OF_ANY, c, id=f"2-{c}", marks=pytest.mark.slow) for c in OF_ANY),
    ],
)
def test_calls(check: str, launch: tuple[str, ...], P: int) -> None:
    verdicts = torch_report(P, "torch_calls.py", *launch)[check]
    assert len(verdicts) == P
    assert all(verdict and all(verdict) for verdict in verdicts), verdicts


def test_single_process_needs_no_process_group() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    k = torch.randn(1, 2, 9, 8)
    out = cross_attention(q, k, k)
    out.sum().backward()
    assert torch.equal(unshard(out), out.detach())
    assert torch.equal(shard(k), k)
    assert Layout.agree(q, k, k).size == 1
    assert q.grad is not None
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert torch.allclose(out, truth, rtol=0, atol=2**-20)
    assert CrossAttention(16, 2)(torch.zeros(1, 5, 16), torch.zeros(1, 9, 16)).shape == (1, 5, 16)
