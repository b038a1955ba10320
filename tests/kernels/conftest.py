"""Recorded vectors and small helpers shared by the kernel tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "official_parity.npz"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the official functions (see tests/golden/README.md)."""
    with np.load(GOLDEN) as recorded:
        return {name: torch.from_numpy(np.array(recorded[name])) for name in recorded.files}


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator, fresh for each test."""
    return torch.Generator().manual_seed(0)
