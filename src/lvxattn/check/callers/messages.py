"""Messages between a check and the process in which the function runs.

    8 bytes: the header's length    the header in JSON    the arrays that it names, in float64

They are plain data in both directions: nothing that the function's process sends is executed.
"""

import json
import math
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.time_limit import LONGEST

Array = npt.NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]

_LARGEST = 2**24  # bytes of a header


class MessageError(Exception):
    """What came is no valid message."""


def send(
    channel: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None
) -> None:
    """Send a message.

    Raises
    ------
    EOFError
        The other process has ended, or closed the channel.
    """
    arrays = arrays or {}
    named = {name: x.shape for name, x in arrays.items()}
    text = json.dumps({**header, "arrays": named}).encode()
    try:
        channel.settimeout(LONGEST)
        channel.sendall(len(text).to_bytes(8, "big") + text)
        for x in arrays.values():
            channel.sendall(x.tobytes())
    except ConnectionError:
        raise EOFError from None


def receive(
    channel: socket.socket, until: float = math.inf, shapes: Shapes | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the header and the arrays of a message.

    Parameters
    ----------
    channel : socket
    until : float
        `time.monotonic()` at the end of the wait.
    shapes : mapping
        By name, of the arrays that may come; all others are refused.

    Raises
    ------
    TimeoutError
        It has not come in time.
    EOFError
        The other process has ended, or closed the channel.
    MessageError
        It is no message, or has other arrays.
    """
    size = int.from_bytes(_read(channel, 8, until), "big")
    if size > _LARGEST:
        raise MessageError(f"expected a header, got {size} bytes")
    text = _read(channel, size, until)
    try:
        header = json.loads(text)
        named = {name: tuple(shape) for name, shape in header.pop("arrays").items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"expected a header, got {bytes(text[:40])!r}") from error
    known = shapes or {}
    for name, shape in named.items():
        if known.get(name) != shape:
            raise MessageError(f"{name}: expected shape {known.get(name)}, got {shape}")
    arrays = {
        name: np.frombuffer(_read(channel, 8 * math.prod(shape), until)).reshape(shape)
        for name, shape in named.items()
    }
    return header, arrays


def _read(channel: socket.socket, size: int, until: float) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        channel.settimeout(min(seconds, LONGEST))
        try:
            count = channel.recv_into(left)
        except TimeoutError:
            continue
        except ConnectionError:
            count = 0
        if not count:
            raise EOFError
        left = left[count:]
    return data
