"""Shard the visual input of a multimodal model over ranks, without a change to its code.

Its modules, in the order in which to read them: `distribute` is the entry, `spread` has what all
models have in common, `adapter` what each kind of model must say; `interception` makes layers of
transformers call `Spread.attend`, `images` cuts images over ranks and looks up which text sees
which, and `mllama`, `idefics`, `openflamingo` and `encoder_decoder` (Whisper, BART and others) have
what differs.  mPLUG-Owl3 is written here: `hyper_attention` has its layers, `owl3` the model, and
`owl3_adapter` spreads it.
"""

from lvxattn.torch_impl.models.distribute import distribute
from lvxattn.torch_impl.models.spread import Spread

__all__ = ["Spread", "distribute"]
