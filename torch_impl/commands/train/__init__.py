"""``... -m lvxattn.torch_impl train``: train a model to find the needle in a long video.

=================  ===============================================================================
`program`          top-down: read, resume, train, test, report, draw
`options`          the command line, the settings that determine the curve, the curriculum
`data`             clips of real handwriting, and questions about them
`model`            patches, two layers of `CrossAttention`, an answer; its attention to every frame
`llama3v`          the same questions to a small Llama 3.2 Vision of transformers
`training`         steps, with looks at held-out images
`checkpoint`       checkpoints to resume from
`run_folder`       the folder that they are in, locked
`training_report`  the curve, and the text
`draw`             the pictures
=================  ===============================================================================
"""

from lvxattn.torch_impl.commands.train.options import add_options
from lvxattn.torch_impl.commands.train.program import run_training

__all__ = ["add_options", "run_training"]
