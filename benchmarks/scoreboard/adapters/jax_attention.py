"""JAX's and Flax's attention; arrays are (B, S, H, D) there."""

import jax
import jax.numpy as jnp

from benchmarks.scoreboard.adapters.limits import (
    needs_array_mask,
    needs_default_scale,
    needs_equal_sizes,
)


def nn(q, k, v, *, scale, mask):
    """jax.nn.dot_product_attention."""
    needs_equal_sizes(k, v, "jax.nn.dot_product_attention ('value array, same shape as key')")
    out = jax.nn.dot_product_attention(*map(_swapped, (q, k, v)), scale=scale, **_masks(mask))
    return _swapped(out)


def nn_with_lse(q, k, v, *, scale, mask):
    """jax.nn.dot_product_attention with return_residual, which is the lse."""
    needs_equal_sizes(k, v, "jax.nn.dot_product_attention ('value array, same shape as key')")
    out, lse = jax.nn.dot_product_attention(
        *map(_swapped, (q, k, v)), scale=scale, return_residual=True, **_masks(mask)
    )
    return _swapped(out), jnp.swapaxes(lse, 1, 2)


def flax_nnx(q, k, v, *, scale, mask):
    """flax.nnx.dot_product_attention."""
    from flax import nnx

    needs_default_scale(q, scale, "flax.nnx.dot_product_attention")
    needs_equal_sizes(k, v, "flax.nnx.dot_product_attention ('value shape should be')")
    return _swapped(nnx.dot_product_attention(*map(_swapped, (q, k, v)), **_masks(mask)))


def flax_linen(q, k, v, *, scale, mask):
    """flax.linen.dot_product_attention."""
    from flax import linen

    needs_default_scale(q, scale, "flax.linen.dot_product_attention")
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("q, k, v num_heads must match (flax.linen)")
    return _swapped(linen.dot_product_attention(*map(_swapped, (q, k, v)), **_masks(mask)))


def _swapped(x):
    return jnp.swapaxes(x, 1, 2)


def _masks(mask):
    needs_array_mask(mask)
    if mask is None:
        return {}
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # "must be 4D"
    return {"mask" if mask.dtype == bool else "bias": mask}
