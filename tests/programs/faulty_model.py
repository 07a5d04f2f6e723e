"""``python -m lvxattn.torch_impl`` with a fault, which the first argument names."""

import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers  # noqa: F401

    from lvxattn.torch_impl.__main__ import main
    from lvxattn.torch_impl.commands.model import kinds, program, work
    from lvxattn.torch_impl.models import images, spread

fault, *line = sys.argv[1:]
if fault == "no factor P":  # the gradients of keys and values are averaged like the text's
    spread.ScaledGradient.backward = staticmethod(lambda _, dx: (dx, None))
elif fault == "no mask":  # every token sees all frames
    images.Images.mask = lambda self: None
elif fault == "wrong token":
    right = work.Work.generate

    def generate(self, count):
        tokens, cost = right(self, count)
        return tokens if self.spread is None else tokens + 1, cost

    work.Work.generate = generate
elif fault == "other weights":
    made = kinds.random_model

    def random_model(*given):
        import torch.distributed as dist

        return made(*given[:-1], given[-1] + dist.get_rank())

    program.random_model = random_model
else:
    raise ValueError(fault)
sys.exit(main(line))
