"""Train a model to find the needle in a long video: ``... -m lvxattn.torch_impl train``.

===============  =================================================================================
`program`        top-down: read, resume, train, test, report, draw
`options`        the command line, and what of it shapes the curve
`data`           clips of real handwriting, and questions about them
`curriculum`     how clips grow, and how large the steps are
`model`          patches, a few layers of `CrossAttention`, an answer
`loop`           steps, looks at images that training never sees, until it is enough
`step`           one step
`checkpoint`     what a run goes on from, after it was cut off
`curve`          what every step came to, as a table
`report`         the text
`attention_maps` where the attention looked
`draw`           the pictures
===============  =================================================================================
"""

from argparse import Namespace

from lvxattn.torch_impl.commands.train.options import add_options
from lvxattn.torch_impl.group import AnyGroup


def run_training(options: Namespace, group: AnyGroup = None) -> int:
    """Train, and return the exit status: `program.run_training`."""
    # Here, since PyTorch's checkpoints take seconds to import, and other commands need none.
    from lvxattn.torch_impl.commands.train.program import run_training

    return run_training(options, group)


__all__ = ["add_options", "run_training"]
