"""Shard the visual input of a multimodal model over ranks, without a change to its code.

    spread = distribute(model, group)
    outputs = model(**spread.inputs(**batch))
    outputs.loss.backward()
    spread.average_gradients()

`spread`           what all models have in common: `distribute`, `Spread`
`interception`     how layers of transformers are made to call `Spread.attend`
`images`           images, cut over ranks, and tables of which text sees which
`mllama`           Llama 3.2 Vision
`idefics`          Idefics, an open Flamingo
`openflamingo`     OpenFlamingo, of its own package
`encoder_decoder`  Whisper, BART and others
"""

from lvxattn.torch_impl.models.spread import Spread, distribute

__all__ = ["Spread", "distribute"]
