"""Memory for large results on the CPU, taken again once nothing uses the result any more.

The C library returns large blocks to the system when they are freed, and the system clears every
page of a new one: for latents of megabytes that takes longer than the kernels. PyTorch keeps memory
for reuse on CUDA alone, so the few blocks that the kernels of one step need are kept here.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque

import torch
from torch import Tensor

#: Smaller results stay within the C library, which keeps their memory itself.
MIN_BYTES = 1 << 20
#: Blocks that wait for reuse, all of the size that was asked for last.
MAX_BLOCKS = 4

# Appending and popping are atomic: threads need no lock.
_waiting: deque[Tensor] = deque(maxlen=MAX_BLOCKS)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, whatever the default device is."""
    size = math.prod(shape) * dtype.itemsize
    if size < MIN_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _take(size)
    if block is None:
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
    # The storage of the tensor, which all its views share, is the only one to hold this object.
    window = (ctypes.c_uint8 * size).from_address(block.data_ptr())
    weakref.finalize(window, _waiting.append, block).atexit = False
    return torch.frombuffer(window, dtype=dtype).view(shape)


def empty_cache() -> None:
    """Free the CPU memory that waits for the results of a next call.

    The CPU kernels keep up to four blocks of the size of the last results (latents, gradients).
    Call this after the last of many calls with large latents, if the memory is wanted elsewhere.
    """
    _waiting.clear()


def _take(size: int) -> Tensor | None:
    while True:
        try:
            block = _waiting.pop()
        except IndexError:
            return None
        if block.numel() == size:
            return block
        # Another size is wanted now: this one is freed.
