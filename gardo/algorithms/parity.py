"""Before the first update: does training see the log-probabilities that sampling stored?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gardo.config import Config
from gardo.distributed.process import Runtime
from gardo.sampling.plan import batches, padded_rows
from gardo.sampling.rollout import Rollout, Sampler
from gardo.types import UserError


def ratio_deviation(
    sampler: Sampler, rollout: Rollout, steps: Sequence[int], batch_size: int
) -> torch.Tensor:
    """Largest ``|ratio - 1|`` of one training batch of rollout samples; 0-d float32.

    The forwards are those of training: its batch size, its gradients, its kernels. The policy has
    not moved, so every difference comes from how the same numbers were computed. The rows are not
    counted as forwards.
    """
    rows_before = sampler.model.rows
    size = rollout.plan.batch_size(batch_size)
    first = batches(rollout.plan.updates[0], size)[0]
    index = padded_rows(first, size, torch.device("cpu"))
    conditioning = sampler.condition([rollout.prompts[i] for i in index.tolist()])
    rows = index.to(rollout.log_prob.device)
    worst = rollout.log_prob.new_zeros(())
    for step in steps:
        t = rollout.transition(step, rows)
        with torch.enable_grad():
            log_prob = t.log_prob(sampler.velocity(t.latents, t.timesteps, conditioning)).detach()
        ratio = torch.exp(log_prob - t.old_log_prob)
        worst = torch.maximum(worst, (ratio - 1).abs().max())
    sampler.model.rows = rows_before
    return worst


def check_parity(deviation: torch.Tensor, bound: float | None, runtime: Runtime) -> float:
    """The deviation over all processes.

    Raises:
        UserError: it is above ``bound`` (None: no bound), or not a number.
    """
    worst = float(runtime.max(deviation))
    if bound is not None and not worst <= bound:
        raise UserError(
            f"before the first update, max |ratio - 1| is {worst:.2e}: log-probs recomputed for "
            f"training differ from those of sampling by more than health.ratio ({bound:.2e}), "
            "which clipping would take for a moved policy. The same numbers were computed in two "
            "ways: give sampling.batch_size and train.batch_size the same value, try "
            "model.compile false or another model.attention_backend, use a wider precision, or "
            "raise the bound (null: report only)"
        )
    return worst


class ParityCheck:
    """The check that a process makes once, before its first update."""

    def __init__(self, config: Config, sampler: Sampler, runtime: Runtime) -> None:
        self.config, self.sampler, self.runtime = config, sampler, runtime
        self.done = False

    def __call__(self, rollout: Rollout, steps: Sequence[int], say: Callable[[str], None]) -> None:
        """UserError, on all processes, if the log-probs of sampling and training disagree."""
        if self.done:
            return
        batch_size, bound = self.config.train.batch_size, self.config.health.ratio
        deviation = ratio_deviation(self.sampler, rollout, steps, batch_size)
        worst = check_parity(deviation, bound, self.runtime)
        say(f"before the first update: max |ratio - 1| = {worst:.1e}")
        self.done = True
