"""The epoch as `gardo.trainer` runs it, on one process, with a clock at its stages."""

from __future__ import annotations

import torch

from benchmarks.clock import StageClock
from benchmarks.workload import EPOCH, Workload
from gardo.algorithms.ema import EMA
from gardo.algorithms.grpo import GRPO
from gardo.algorithms.shaping import Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.models.adapters import POLICY
from gardo.rewards.scoring import ScoreBook
from gardo.sampling.graph import GraphedTrajectories, use_graphs
from gardo.sampling.rollout import Rollout


class OurEpoch:
    """This library's parts in the trainer's order.

    Scoring follows sampling here, where the trainer lets them overlap, so that each has its time;
    the parity check, once per run, is left out.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        train = work.config.train
        graphs = use_graphs(work.config.sampling.cuda_graph, work.device)
        self.sampler = work.sampler(graphs=GraphedTrajectories() if graphs else None)
        optimizer = work.runtime.accelerator.prepare(work.optimizer(train.fused_optimizer))
        self.grpo = GRPO(
            work.config.algorithm, train, self.sampler, work.adapters, optimizer, work.runtime
        )
        self.ema = EMA(work.adapters.parameters(POLICY), train) if train.ema else None
        self.reference_rows = 0
        self.gated_share = 0.0
        self.trained_steps = 0

    def run(self, clock: StageClock) -> dict[str, float]:
        """Run the epoch from the workload's start; returns the updates' metrics."""
        work = self.work
        work.restore()
        with clock.stage("prompts"):
            work.embeddings.stage(work.texts)
        rollout, book = self._roll_out(clock)
        with clock.stage("shape"):
            shaped = Shaper(work.config.algorithm, work.rewards)(book, work.plan, work.runtime)
        with clock.stage("reference"):
            data = self.grpo.prepare(rollout, shaped, work.schedule, work.config.seed, EPOCH)
        self.reference_rows, self.trained_steps = data.reference_rows, len(data.steps)
        self.gated_share = len(shaped.gated_rows) / len(rollout)
        with clock.stage("update"):
            stats = UpdateStats()
            for index in range(work.config.train.updates_per_epoch):
                self.grpo.update(data, index, stats)
                if self.ema is not None:
                    self.ema.step()
            metrics, _ = stats.metrics(work.runtime)
        return metrics

    def _roll_out(self, clock: StageClock) -> tuple[Rollout, ScoreBook]:
        work, sampling = self.work, self.work.config.sampling
        book, index = ScoreBook(), self.work.plan.prompt_index.tolist()
        with clock.stage("sample"):
            rollout, filled = self.sampler.rollout(
                work.plan, work.texts, work.table, work.config.seed, EPOCH, sampling.same_latent
            )
        while True:
            with clock.stage("sample"):
                rows = next(filled, None)
            if rows is None:
                return rollout, book
            with clock.stage("decode"):
                images = work.model.decode(rollout.latents_at(-1, rows))
            with clock.stage("score"):
                score(work, book, images, index[rows])


def score(work: Workload, book: ScoreBook, images: torch.Tensor, prompts: list[int]) -> None:
    """Score a batch with all rewards that train, and extract its features."""
    some = [work.prompts[i] for i in prompts]
    scores = work.rewards.score(work.rewards.training_names, images, some)
    features = None if work.rewards.features is None else work.rewards.features(images)
    book.add(scores, features)
