"""An epoch's data and its micro-batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gardo.algorithms.reference import RowVelocities
from gardo.algorithms.shaping import ShapedEpoch
from gardo.sampling.plan import padded_rows
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.trajectory import Conditioning


@dataclass
class EpochData(ABC):
    """One epoch's samples, ready for its updates.

    Attributes:
        reference: velocities of the penalised rows; None switches the KL off.
        steps: the entries of the rollout's latents that are trained.
        reference_rows: transformer rows that the reference took.
    """

    rollout: Rollout
    shaped: ShapedEpoch
    reference: RowVelocities | None
    steps: Sequence[int]
    reference_rows: int = field(default=0, kw_only=True)

    @abstractmethod
    def at(self, k: int, rows: Tensor) -> Any:
        """What is trained on at the ``k``-th trained step: a dataclass of ``[B, ...]`` tensors.

        The model is given its ``latents`` and ``timesteps``.
        """

    def ref_velocity(self, k: int, batch: MicroBatch) -> Tensor | None:
        """Of the reference; what other than gated rows hold must not be used. None without any."""
        if self.reference is None or not batch.gated:
            return None
        return self.reference.rows(k, batch.rows)


@dataclass
class MicroBatch:
    """A full batch of rows; padding repeats the last sample without advantage and gate.

    Attributes:
        size: rows without the padding.
        gated: how many of them carry the KL penalty.
        kl_weight: see `penalty.kl_weight`.
    """

    rows: Tensor
    size: int
    gated: int
    conditioning: Conditioning
    advantage: Tensor
    gate: Tensor
    kl_weight: float

    @classmethod
    def take(
        cls,
        data: EpochData,
        sampler: Sampler,
        rows: slice,
        batch_size: int,
        kl_weight: float,
    ) -> MicroBatch:
        """Fill a batch with consecutive rows of an update; prompts are looked up once."""
        shaped, rollout = data.shaped, data.rollout
        index = padded_rows(rows, batch_size, torch.device("cpu"))
        conditioning = sampler.condition([rollout.prompts[i] for i in index.tolist()])
        device = rollout.log_prob.device
        index = index.to(device)
        size, gated = rows.stop - rows.start, count_within(shaped.gated_rows, rows)
        real = torch.arange(batch_size, device=device) < size
        advantage = torch.where(real, shaped.advantage[index], 0.0)
        gate = shaped.gate[index] & real
        return cls(index, size, gated, conditioning, advantage, gate, kl_weight)


def count_within(sorted_rows: Sequence[int], rows: slice) -> int:
    """How many of the sorted rows stand in a slice."""
    return bisect_left(sorted_rows, rows.stop) - bisect_left(sorted_rows, rows.start)
