"""Held-out evaluation: images of fixed prompts and seeds, without noise, judged by every reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gardo.config import Config
from gardo.evaluation.metrics import feature_distance, mean_pairwise_distance
from gardo.models.base import FlowModel
from gardo.models.embeddings import EmbeddingTable
from gardo.rewards.overlap import ScoringWorker
from gardo.rewards.scoring import RewardSet, ScoreBook, reward_metrics
from gardo.runtime.images import caption
from gardo.runtime.rng import generator
from gardo.sampling.graph import GraphedTrajectories
from gardo.sampling.plan import batches
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.tiny.scenes import parse_prompt, render
from gardo.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        metrics: ``reward/<name>/mean`` and ``/std`` of every reward, ``diversity/pairwise`` and,
            with reference images, ``feature_distance``.
        images: ``[n, 3, H, W]`` float32 on the CPU, the ones for the grid.
        captions: prompt and scores of each.
    """

    metrics: dict[str, float]
    images: Tensor
    captions: list[str]


class HeldOutEvaluator:
    """Draws the same prompts from the same noise every time, so that only the policy differs."""

    def __init__(
        self,
        config: Config,
        model: FlowModel,
        embeddings: EmbeddingTable,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        resolution: int,
        graphs: GraphedTrajectories | None = None,
    ) -> None:
        self.config = config.evaluation
        self.rewards = rewards
        self.device = model.device
        prompts = prompts[: self.config.max_prompts]
        # sample-major, so that the first images of a grid show every prompt
        self.samples = list(prompts) * self.config.samples_per_prompt
        self.group_ids = torch.arange(len(self.samples), device=self.device) % len(prompts)
        guidance = self.config.guidance_scale
        self.sampler = Sampler(
            model,
            embeddings,
            resolution,
            config.sampling.guidance_scale if guidance is None else guidance,
            config.sampling.batch_size,
            graphs,
        )
        schedule = model.schedule(self.config.num_steps, resolution)
        self.table = step_table(schedule, self.device, kind="ode", noise_level=0.0)
        self._real_features: Tensor | None = None

    @torch.inference_mode()
    def __call__(self) -> Evaluation:
        kept = []
        self.sampler.embeddings.stage([p.text for p in self.samples])
        names, shown = self.rewards.all_names, min(self.config.grid_images, len(self.samples))
        with ScoringWorker(self.rewards, names, self.device) as worker:
            for rows in batches(slice(0, len(self.samples)), self.sampler.batch_size):
                some = self.samples[rows]
                images = self._draw(rows, [p.text for p in some])
                worker.submit(images, some)
                kept.append(images[: max(0, shown - rows.start)].cpu())
            book = worker.collect()
        metrics: dict[str, float] = {}
        for name in names:
            scores = book.scores(name)
            self.rewards.check_missing(name, scores)
            metrics |= reward_metrics(name, scores, book.seconds_per_image(name))
        metrics |= self._feature_metrics(book.features())
        return Evaluation(metrics, torch.cat(kept), self._captions(book, shown))

    def _draw(self, rows: slice, prompts: Sequence[str]) -> Tensor:
        steps = self.table.num_steps
        latents = torch.empty(
            (steps + 1, len(prompts), *self.sampler.latent_shape), device=self.device
        )
        keys = [("evaluation", i) for i in range(rows.start, rows.stop)]
        latents[0] = self.sampler.initial_latents(keys, self.config.seed)
        self.sampler.run(self.table, prompts, latents)
        return self.sampler.model.decode(latents[-1])

    def _feature_metrics(self, features: Tensor | None) -> dict[str, float]:
        if features is None:
            return {}
        metrics = {"diversity/pairwise": float(mean_pairwise_distance(features, self.group_ids))}
        if self.config.reference_images == "shapes" and self.rewards.features is not None:
            if self._real_features is None:
                scenes = [parse_prompt(p.text) for p in self.samples]
                real = render(scenes * 4, generator(self.config.seed, "real"))
                self._real_features = self.rewards.features(real.to(self.device))
            metrics["feature_distance"] = float(feature_distance(features, self._real_features))
        return metrics

    def _captions(self, book: ScoreBook, shown: int) -> list[str]:
        names = self.rewards.training_names
        columns = [book.scores(name)[:shown].tolist() for name in names]
        return [
            caption(prompt.text, dict(zip(names, scores, strict=True)))
            for prompt, *scores in zip(self.samples[:shown], *columns, strict=True)
        ]
