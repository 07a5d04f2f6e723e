"""Run ``model`` with faults; rank 0 prints what each rank said and its status, as JSON.

usage: faulty_model.py JSON, an object of command lines by fault
"""

import json
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers  # noqa: F401

    from lvxattn.torch_impl.__main__ import main
    from lvxattn.torch_impl.commands.model import program, work
    from lvxattn.torch_impl.models import gradients, images

dist.init_process_group("gloo")
generate, random_model = work.Work.generate, program.random_model


def wrong_token(self: Any, count: int) -> Any:
    """Generate tokens, wrong if spread."""
    tokens, cost = generate(self, count)
    return tokens if self.spread is None else tokens + 1, cost


FAULTS: dict[str, tuple[Any, str, Any]] = {
    # The gradients of keys and values are averaged like the text's.
    "no factor P": (gradients.ScaledGradient, "backward", staticmethod(lambda _, dx: (dx, None))),
    # Every token sees all frames.
    "no mask": (images.Images, "mask", lambda _: None),
    "wrong token": (work.Work, "generate", wrong_token),
    "other weights": (
        program, "random_model", lambda *given: random_model(*given[:-1], dist.get_rank()),
    ),
}  # fmt: skip

said = {}
for fault, line in json.loads(sys.argv[1]).items():
    where, name, broken = FAULTS[fault]
    right = vars(where)[name]
    setattr(where, name, broken)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(line)
    setattr(where, name, right)
    said[fault] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
gathered: list[Any] = [None] * dist.get_world_size()
dist.all_gather_object(gathered, said)
if dist.get_rank() == 0:
    print(json.dumps({fault: [rank[fault] for rank in gathered] for fault in said}))
dist.destroy_process_group()
