"""The source of a user's file with attention functions, to be checked by name."""

SOURCE = '''
"""Kernels."""

import os

import numpy as np

from lvxattn.reference import full_attention, full_attention_backward

calls = []
number = 3


def right(q, k, v, *, scale, mask):
    calls.append(q.dtype.name)
    out, lse = full_attention(q, k, v, scale=scale, mask=mask)
    return out.astype(q.dtype), lse


def back(dout, q, k, v, out, lse, *, scale, mask):
    found = full_attention_backward(dout, q, k, v, out, lse, scale=scale, mask=mask)
    return tuple(x.astype(q.dtype) for x in found)


def wrong_back(*args, **options):
    dq, dk, dv = back(*args, **options)
    return dq, dk, dv * 2


def nan(q, k, v, *, scale, mask):
    """Dead rows come out as NaN."""
    if callable(mask):
        raise NotImplementedError("no callable masks")
    out, lse = right(q, k, v, scale=scale, mask=mask)
    return np.where(lse[..., None] == -np.inf, np.nan, out).astype(q.dtype)


def refuses(q, k, v, *, scale, mask):
    raise NotImplementedError("not today")


def exits(q, k, v, *, scale, mask):
    """The process ends in the gaussian case."""
    return os._exit(0) if k.shape[2] == 128 else right(q, k, v, scale=scale, mask=mask)


class Kernels:
    """Functions in a class."""

    @staticmethod
    def right(q, k, v, *, scale, mask):
        return right(q, k, v, scale=scale, mask=mask)


right.backward = back
'''
