"""Who carries the KL, and with what weight."""

from __future__ import annotations

from dataclasses import replace

import torch

from gardo.algorithms.batches import EpochData, count_within
from gardo.algorithms.shaping import ShapedEpoch
from gardo.config import AlgorithmConfig
from gardo.distributed.process import Runtime
from gardo.sampling.plan import EpochPlan


def penalised(
    algorithm: AlgorithmConfig,
    batch_size: int,
    shaped: ShapedEpoch,
    plan: EpochPlan,
    runtime: Runtime,
) -> ShapedEpoch:
    """The samples that carry the KL: the gated ones, and where none is gated none.

    But with ``compat: official``, DiffusionNFT penalises all samples of an update without a gated
    one, or with ``kl_reduction: microbatch`` of a micro-batch without one.

    Args:
        batch_size: the largest of a micro-batch, ``train.batch_size``.
    """
    if algorithm.kl_when_ungated == "none" or shaped.mode not in ("paper", "official"):
        return shaped
    rows, per_update = list(shaped.gated_rows), list(shaped.gated_per_update)
    for index, update in enumerate(plan.updates):
        if algorithm.kl_reduction == "microbatch":
            parts = plan.batches(index, plan.batch_size(batch_size))
        else:
            parts = [update] if per_update[index] == 0 else []
        ungated = [part for part in parts if count_within(shaped.gated_rows, part) == 0]
        added = [row for part in ungated for row in range(part.start, part.stop)]
        rows += added
        # how many the other processes add is theirs to know
        more = torch.tensor(float(len(added)), device=shaped.gate.device)
        per_update[index] += int(runtime.sum(more))
    gate = torch.zeros_like(shaped.gate)
    gate[torch.tensor(rows, dtype=torch.int64, device=gate.device)] = True
    return replace(
        shaped, gate=gate, gated_rows=tuple(sorted(rows)), gated_per_update=tuple(per_update)
    )


def kl_weight(algorithm: AlgorithmConfig, data: EpochData, index: int, rows: slice) -> float:
    """Of a penalised sample's KL in a micro-batch, where its policy loss has weight 1.

    Args:
        index: of the update.
        rows: of the micro-batch.
    """
    gated = count_within(data.shaped.gated_rows, rows)
    if data.reference is None or not gated:
        return 0.0
    if algorithm.kl_reduction == "gated":
        return data.rollout.plan.update_sizes[index] / data.shaped.gated_per_update[index]
    if algorithm.kl_reduction == "microbatch":
        return (rows.stop - rows.start) / gated
    return 1.0
