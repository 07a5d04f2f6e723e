"""Attention shapes of the models that the paper measures, from their published configurations.

Sources: arXiv:2502.02406, table 1 (cross-attention layers, language-model blocks and visual tokens
per frame); the configurations of Llama 3.2 Vision, mPLUG-Owl3 (Qwen2 language models) and
OpenFlamingo (heads and widths).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A multimodal model, seen from its cross-attention.

    Attributes
    ----------
    name : str
    hidden : int
        Width of the language model.
    heads, kv_heads : int
        Query heads, and the key-value heads that they share.
    head_dim : int
    cross_layers, blocks : int
        Cross-attention layers, and transformer blocks of the language model.
    tokens_per_frame : int
        Visual tokens that one video frame becomes.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    cross_layers: int
    blocks: int
    tokens_per_frame: int

    def shapes(
        self, text_tokens: int, frames: int, batch: int = 1
    ) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Return the whole problem's shapes.

        Parameters
        ----------
        text_tokens, frames : int
        batch : int

        Returns
        -------
        q : (B, H, S_Q, D)
        k : (B, H_KV, S_KV, D)
            Also that of v.

        Raises
        ------
        ValueError
            A count is negative, or batch is below 1.
        """
        for name, count, least in (
            ("text_tokens", text_tokens, 0),
            ("frames", frames, 0),
            ("batch", batch, 1),
        ):
            if count < least:
                raise ValueError(f"{name}: expected at least {least}, got {count}")
        S_KV = frames * self.tokens_per_frame
        return (
            (batch, self.heads, text_tokens, self.head_dim),
            (batch, self.kv_heads, S_KV, self.head_dim),
        )


MODELS = {
    model.name: model
    for model in (
        Model("llama3v", 4096, 32, 8, 128, cross_layers=8, blocks=40, tokens_per_frame=6404),
        Model("mplug-owl3-7b", 3584, 28, 4, 128, cross_layers=4, blocks=28, tokens_per_frame=729),
        Model("mplug-owl3-2b", 1536, 12, 2, 128, cross_layers=4, blocks=28, tokens_per_frame=729),
        Model("mplug-owl3-1b", 896, 14, 2, 64, cross_layers=4, blocks=24, tokens_per_frame=729),
        Model("openflamingo-9b", 4096, 8, 8, 64, cross_layers=8, blocks=32, tokens_per_frame=64),
        Model("openflamingo-3b", 2048, 8, 8, 64, cross_layers=24, blocks=24, tokens_per_frame=64),
    )
}
