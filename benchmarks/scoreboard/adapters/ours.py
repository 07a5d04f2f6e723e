"""Our own cross_attention in PyTorch, by the same rules as the others."""

from lvxattn.torch_impl import cross_attention


def lv_xattn(q, k, v, group, *, scale, mask):
    """Send the queries round."""
    return _attend(q, k, v, group, "lv-xattn", scale, mask)


def ring(q, k, v, group, *, scale, mask):
    """Send the keys round."""
    return _attend(q, k, v, group, "ring", scale, mask)


def gather(q, k, v, group, *, scale, mask):
    """Gather the queries on every rank, and sum the results."""
    return _attend(q, k, v, group, "gather", scale, mask)


def ulysses(q, k, v, group, *, scale, mask):
    """Give every rank some heads."""
    try:
        return _attend(q, k, v, group, "ulysses", scale, mask)
    except ValueError as error:
        if "divisible by the" in str(error):
            raise NotImplementedError(str(error)) from None
        raise


def _attend(q, k, v, group, schedule, scale, mask):
    return cross_attention(
        q, k, v, group, schedule=schedule, scale=scale, mask=mask, return_lse=True
    )
