"""``... -m lvxattn.torch_impl model``: a whole multimodal model, spread over the ranks.

=============  ===================================================================================
`program`      top-down: build, distribute, run, check, report
`options`      the command line
`kinds`        which models there are, random weights or a checkpoint's, a batch
`llama3v`,     the sizes of each model, and its batches
`owl3`,
`idefics`,
`openflamingo`,
`whisper`
`work`         what is run: passes, training steps or generation, and its seconds by part
`check`        the same in one process, and the errors
`report`       the table and the JSON object
=============  ===================================================================================
"""

from argparse import Namespace

from lvxattn.torch_impl.commands.model.options import add_options
from lvxattn.torch_impl.group import Group


def run_model(options: Namespace, group: Group) -> int:
    """Run a model, and return the exit status: `program.run_model`."""
    # Here, since transformers takes seconds to import, and other commands do not need it.
    from lvxattn.torch_impl.commands.model.program import run_model

    return run_model(options, group)


__all__ = ["add_options", "run_model"]
