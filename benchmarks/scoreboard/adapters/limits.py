"""Limits that several packages document, each refused in the same words."""

CHECKED = True  # False leaves out what needs a message


def needs_array_mask(mask):
    """Raise NotImplementedError for a mask that is a function."""
    if callable(mask):
        raise NotImplementedError("a mask is an array, not a function of indices")


def needs_no_mask(mask, package):
    """Raise NotImplementedError for any mask."""
    if mask is not None:
        raise NotImplementedError(f"{package} takes no mask")


def needs_equal_heads(q, k, package):
    """Raise NotImplementedError for grouped heads."""
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError(f"{package} has one number of heads")


def needs_equal_sizes(k, v, package):
    """Raise NotImplementedError where D_V is not D."""
    if k.shape[3] != v.shape[3]:
        raise NotImplementedError(f"{package} has one head size for keys and values")


def needs_default_scale(q, scale, package):
    """Raise NotImplementedError for a scale other than 1 / sqrt(D)."""
    if scale != q.shape[3] ** -0.5:
        raise NotImplementedError(f"{package} has no scale argument")


def needs_all_ranks(group, package):
    """Raise NotImplementedError for a group of some of the ranks."""
    import torch.distributed as dist

    if dist.get_world_size(group) != dist.get_world_size():
        raise NotImplementedError(f"{package}: tried here with all ranks, which make its mesh")


def needs_equal_shards(q, k, group, package):
    """Raise NotImplementedError on all ranks where shards differ in length.  Collective."""
    import torch.distributed as dist

    if not CHECKED:
        return
    lengths = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, (q.shape[2], k.shape[2]), group=group)
    if len(set(lengths)) > 1:
        raise NotImplementedError(f"{package}: the shards of all ranks have one length")


def needs_divisible_heads(q, k, group, package):
    """Raise NotImplementedError where ranks cannot have equal numbers of heads."""
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise NotImplementedError(f"{package}: the numbers of heads are multiples of that of ranks")


def needs_self_attention(q, k, package):
    """Raise NotImplementedError where there are not as many queries as keys."""
    if q.shape[2] != k.shape[2]:
        raise NotImplementedError(f"{package}: as many queries as keys")


def needs_filled_shards(q, k, group, package):
    """Raise NotImplementedError on all ranks where some rank has no row.  Collective."""
    import torch.distributed as dist

    if not CHECKED:
        return
    lengths = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, min(q.shape[2], k.shape[2]), group=group)
    if min(lengths) == 0:
        raise NotImplementedError(f"{package}: every rank has queries and keys")
