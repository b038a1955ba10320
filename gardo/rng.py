"""Stateless randomness: every random number is a function of the run's seed and where it is used.

No generator state outlives a call, so a run can be resumed at any epoch, and a sample gets the
same noise whatever the batch size and the number of processes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """Hash a seed and the place of its use to an independent 63-bit seed.

    >>> derive_seed(1, "noise", 3) != derive_seed(1, "noise", 4)
    True
    """
    text = "/".join(str(k) for k in (seed, *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one place of use."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


def normal_rows(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``[len(generators), *shape]`` float32, a row from each generator."""
    device = generators[0].device
    out = torch.empty((len(generators), *shape), device=device)
    for row, source in zip(out, generators, strict=True):
        row.normal_(generator=source)
    return out


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seed the global generators of Python, numpy and torch.

    This package does not draw from them; code of the user's that does, such as a reward, then
    repeats itself in a resumed run.
    """
    derived = derive_seed(seed, *keys)
    random.seed(derived)
    numpy.random.seed(derived % 2**32)
    torch.manual_seed(derived)
