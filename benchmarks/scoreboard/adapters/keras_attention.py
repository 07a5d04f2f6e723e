"""keras.ops.dot_product_attention on JAX; arrays are (B, S, H, D) there."""

import jax.numpy as jnp
import keras

from benchmarks.scoreboard.adapters.limits import needs_array_mask, needs_equal_sizes


def attention(q, k, v, *, scale, mask):
    """keras.ops.dot_product_attention."""
    needs_array_mask(mask)
    needs_equal_sizes(k, v, "keras.ops.dot_product_attention ('value array with the same shape')")
    masks = {}
    if mask is not None:
        masks["mask" if mask.dtype == bool else "bias"] = mask
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = keras.ops.dot_product_attention(q, k, v, scale=scale, **masks)
    return jnp.swapaxes(out, 1, 2)
