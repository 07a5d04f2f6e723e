"""The examples run with the commands in their docstrings, and print right results."""

# ruff: noqa: E402 - what follows needs torch

import re
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from lvxattn.torch_impl.examples import both_kinds_of_keys, fully_sharded, packed_documents
from lvxattn.torch_impl.examples import compile as compiled
from lvxattn.torch_impl.examples import two_dimensional_mesh as mesh
from tests.launch import Ended
from tests.tolerances import UNIT, summed
from tests.torch_ranks import forked

# A gradient passes through about as many sums as the model has products, forward and back, and a
# step hands on its error to the next.  None of the sums is longer than the keys or all tokens of
# the batch; their magnitudes are at most a few times the largest gradient, which is in the 4.
PRODUCTS, STEPS = 2 * (6 * mesh.LAYERS + 3), 3
LIMIT = 4 * STEPS * PRODUCTS * summed(UNIT["float64"], max(mesh.S_KV, 5 * mesh.S_Q, mesh.E))


def ended(P: int, *options: str) -> Ended:
    """Return how the example ends on P ranks."""
    return forked(P, "-m", mesh.__name__, "--steps", str(STEPS), *options)


def table(P: int, *options: str) -> list[tuple[float, float, float]]:
    """Return what it prints by step: loss on the mesh, loss alone, difference of gradients."""
    end = ended(P, *options)
    assert (end.status, end.err, end.left) == (0, "", ())
    assert end.out.startswith(f"{P // 2} x 2 ranks (data x context), gloo, cpu\n")
    rows = re.findall(r"^ +\d+  (\S+) +(\S+) +(\S+)$", end.out, re.MULTILINE)
    assert len(rows) == STEPS
    return [(float(loss), float(alone), float(apart)) for loss, alone, apart in rows]


def test_gradients_on_a_mesh_equal_those_of_one_process() -> None:
    assert LIMIT < 1e-11  # far from what any mistake makes
    for loss, alone, apart in table(4):
        assert apart <= LIMIT
        assert abs(loss - alone) <= LIMIT * alone


def test_mean_over_own_tokens_differs() -> None:
    for loss, alone, apart in table(2, "--divide-by", "own"):
        assert apart > 0.01
        assert abs(loss - alone) > 1e-4 * alone


def test_impossible_mesh_prints_one_line() -> None:
    end = ended(2, "--context", "3")
    first = end.err.splitlines()[0]
    assert first == "--context: expected a divisor of the number of ranks, 2, got 3"
    assert end.err.count("--context: expected") == 1
    assert "two_dimensional_mesh.py" not in end.err.split("\n", 1)[1]  # no traceback of ours
    assert (end.status, end.out, end.left) == (1, "", ())


def test_packed_documents_equal_one_process_and_send_a_third() -> None:
    end = forked(4, "-m", packed_documents.__name__)
    assert (end.status, end.err, end.left) == (0, "", ())
    assert "8 documents on 4 ranks" in end.out
    with_rule, without = (
        int(n.replace(",", "")) for n in re.search(r": (\S+) of (\S+)\n", end.out).groups()
    )
    assert 0 < with_rule <= without / 3
    worst = float(re.search(r"from one process: (\S+)\n", end.out)[1])
    # Sums over at most all keys of terms below 10 in 10 products.
    assert worst <= 100 * summed(UNIT["float64"], sum(packed_documents.IMAGES))


def test_keys_of_both_kinds_equal_one_softmax() -> None:
    end = forked(4, "-m", both_kinds_of_keys.__name__)
    assert (end.status, end.err, end.left) == (0, "", ())
    assert "45 queries on 4 ranks" in end.out
    worst = float(re.search(r"from one process: (\S+)\n", end.out)[1])
    # As above; one text key's gradient is a sum over all queries.
    assert worst <= 100 * summed(UNIT["float64"], both_kinds_of_keys.VIDEO)


def test_compiled_model_equals_eager_without_compiling_again() -> None:
    end = forked(2, "-m", compiled.__name__, "--backend", "aot_eager")
    assert (end.status, end.left) == (0, ()), end.err
    rows = re.findall(r"^ +\d+  +(\S+) +(\S+) +(\S+) +(\d+)$", end.out, re.MULTILINE)
    assert len(rows) == 3
    limit = 4 * 3 * 2 * 10 * compiled.LAYERS * summed(UNIT["float32"], 200)
    assert limit < 0.05  # far from what any mistake makes
    for loss, alone, apart, compilations in rows:
        assert float(loss) == pytest.approx(float(alone), rel=limit)
        assert float(apart) <= limit
        assert compilations == "1"


@pytest.mark.parametrize(
    "example",
    [mesh, fully_sharded, compiled, packed_documents, both_kinds_of_keys],
    ids=lambda x: x.__name__.split(".")[-1],
)
def test_documented_command_runs(example: Any) -> None:
    command = f"torchrun --standalone --nproc-per-node 4 -m {example.__name__}\n"
    assert command in (example.__doc__ or "")
