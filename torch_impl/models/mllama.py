"""Llama 3.2 Vision of transformers: cross-attention layers between those of a Llama."""

from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.common.masks import MaskRule


class Mllama:
    """Its images are cut along their axis; tiles and patches of an image stay together.

    The model's own mask says for each text token and tile of all images whether it may attend; a
    token that may attend to none attends to all, and the layer's MLP leaves it alone.  Made as the
    model makes it, it would be as large as the scores.  Here it stays a table of tiles, which a
    rule looks up.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = getattr(model, "model", model)
        self.table: Tensor | None = None  # (B, s_q, tiles of all images), bool
        self.model.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        self.model.language_model.register_forward_pre_hook(self._mask_rows, with_kwargs=True)
        self.patches = self.model.vision_model.num_patches
        self.rows: Tensor | None = None

    def layers(self) -> list[tuple[nn.Module, str]]:
        text = self.model.language_model
        return [
            (text.layers[n].cross_attn, "cross_attention_states") for n in text.cross_attention_layers
        ]

    def cut(self, batch: dict[str, Any], rank: int, size: int) -> tuple[dict[str, Any], int]:
        local = dict(batch)
        images, tiles = batch["aspect_ratio_mask"].shape[1:]
        start, stop = (images * n // size for n in (rank, rank + 1))
        # A rank without images encodes one all the same, so that all ranks' towers take part.
        mine = slice(start, stop) if stop > start else slice(0, 1)
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            local[name] = batch[name][:, mine]
        return local, (stop - start) * tiles * self.patches

    def rule(self) -> MaskRule | None:
        table, patches = self.table, self.patches
        if table is None:
            return None

        def sees(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            return table[b, q_index, kv_index // patches]

        return sees

    def _take_mask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.pop("cross_attention_mask", None)
        self.table = self.rows = None
        if mask is not None:
            ids = kwargs.get("input_ids")
            length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
            if mask.shape[1] != length:
                cache = kwargs.get("cache", kwargs.get("past_key_values"))
                past = 0 if cache is None else int(cache.get_seq_length())
                mask = mask[:, past : past + length]
            table = mask.flatten(2).bool()
            seen = table.any(-1, keepdim=True)
            self.table, self.rows = table | ~seen, seen[:, None]
        return args, kwargs

    def _mask_rows(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.rows is not None:
            kwargs["full_text_row_masked_out_mask"] = self.rows.to(self.model.dtype)
        return args, kwargs
