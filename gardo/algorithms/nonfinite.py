"""Updates that are left out when their numbers are not finite; too many in a row end the run."""

from __future__ import annotations

from gardo.algorithms.postmortem import write_postmortem
from gardo.algorithms.stats import UpdateStats
from gardo.algorithms.update import Algorithm, Data
from gardo.run.health import Health, Outcome
from gardo.types import UserError


def update_if_finite(
    algorithm: Algorithm[Data],
    health: Health,
    epoch: int,
    data: Data,
    index: int,
    stats: UpdateStats,
) -> bool:
    """Make update ``index`` of an epoch, unless its numbers are not finite; whether it was made.

    Raises:
        UserError: too many in a row were not, on all processes; the batch to blame is dumped.
    """
    outcome = algorithm.update(data, index, stats)
    if health.count(outcome, epoch, index):
        dump = write_postmortem(algorithm, health, outcome, epoch, data, index)
        count = health.skipped_in_a_row
        updates = "1 update was" if count == 1 else f"{count} updates in a row were"
        raise UserError(
            f"{updates} left out, the last one "
            f"(epoch {epoch}, update {index}) for {outcome.value}. {dump}. Weights and earlier "
            "checkpoints are as they were. Try a smaller train.learning_rate or "
            "algorithm.adv_clip, precision bf16 or fp32 instead of fp16, from an earlier "
            "checkpoint if it keeps happening; health.max_skipped_in_a_row is "
            f"{health.config.max_skipped_in_a_row}"
        )
    return outcome is Outcome.MADE
