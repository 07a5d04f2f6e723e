"""Spread a multimodal model's visual input over ranks, without a change to the model.

    spread = distribute(model, group)
    outputs = model(**spread.inputs(**batch))
    outputs.loss.backward()
    spread.average_gradients()

`spread`       what all models have in common: `distribute`, `Spread`
`interception` how a model's cross-attention layers are made to call `Spread.attend`
`mllama`       Llama 3.2 Vision
"""

from lvxattn.torch_impl.models.spread import Spread, distribute

__all__ = ["Spread", "distribute"]
