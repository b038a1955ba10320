"""Held-out evaluation: images of fixed prompts and seeds, without noise, judged by every reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gardo.config import Config
from gardo.distributed.process import Runtime
from gardo.evaluation.metrics import feature_distance, mean_pairwise_distance
from gardo.models.base import FlowModel
from gardo.models.embeddings import EmbeddingTable
from gardo.rewards.overlap import ScoringWorker
from gardo.rewards.scoring import RewardSet, reward_metrics
from gardo.rng import generator
from gardo.run.images import caption, image_grid, save_grid
from gardo.sampling.graph import GraphedTrajectories
from gardo.sampling.plan import shared_batches
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.tiny.scenes import parse_prompt, render
from gardo.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        metrics: ``reward/<name>/mean`` and ``/std`` of every reward, ``/sigma`` of those that state
            it, ``diversity/pairwise`` and, with reference images, ``feature_distance``.
        images: ``[n, 3, H, W]`` float32 on the CPU, the ones for the grid.
        captions: prompt and scores of each.
    """

    metrics: dict[str, float]
    images: Tensor
    captions: list[str]

    def save_grid(self, folder: Path, epoch: int, title: str) -> None:
        """Draw the images, if there are any, for the epoch in a run's image folder."""
        if count := len(self.images):
            columns = max(1, round(count**0.5 * 1.3))
            save_grid(folder, image_grid(self.images, self.captions, columns), epoch, title)


class HeldOutEvaluator:
    """Draws the same prompts from the same noise every time, so that only the policy differs.

    Processes share the batches and all have the result, which is that of one process.
    """

    def __init__(
        self,
        config: Config,
        model: FlowModel,
        embeddings: EmbeddingTable,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        resolution: int,
        graphs: GraphedTrajectories | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        """``runtime`` are the processes that evaluate together; None: this one alone."""
        self.config = config.evaluation
        self.epochs = config.epochs
        self.runtime = runtime
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

    def due(self, done: int) -> str | None:
        """Name of the evaluation that follows ``done`` epochs; None if there is none."""
        if done == 0:
            return "start" if self.config.at_start else None
        if done == self.epochs:
            return "end"
        every = self.config.every
        return "during" if every and done % every == 0 else None

    @torch.no_grad()  # no inference mode: see `velocity_pass`
    def __call__(self) -> Evaluation:
        kept = []
        self.sampler.embeddings.stage([p.text for p in self.samples])
        total, names = len(self.samples), self.rewards.all_names
        shown = min(self.config.grid_images, total)
        rank, size = (self.runtime.rank, self.runtime.world_size) if self.runtime else (0, 1)
        mine, idle = shared_batches(total, self.sampler.batch_size, rank, size)
        with ScoringWorker(self.rewards, names, self.device) as worker:
            for rows in mine:
                images = self._draw(rows)
                worker.submit(images, self.samples[rows])
                kept.append(images[: max(0, shown - rows.start)].cpu())
            if idle and self.runtime is not None and self.runtime.sharded:
                self._draw(slice(0, 1))  # the forwards of the others wait for those of this process
            book = worker.collect()
        ids = [i for rows in mine for i in range(rows.start, rows.stop)]
        columns: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for name in names:
            columns[name] = self._gather(book.scores(name) if mine else None, 1, ids, total)
            self.rewards.check_missing(name, columns[name])
            metrics |= reward_metrics(name, columns[name], book.seconds_per_image(name))
        further = {f"reward/{key}/mean": values for key, values in book.details().items()}
        sigmas = {f"reward/{name}/sigma": book.sigma(name) for name in names}
        further |= {key: values for key, values in sigmas.items() if values is not None}
        for key in self.runtime.union(further) if self.runtime else sorted(further):
            found = further.get(key, torch.full((len(ids),), torch.nan))
            column = self._gather(found if mine else None, 1, ids, total)
            metrics[key] = float(column.double().nanmean())
        if self.rewards.features is not None:
            metrics |= self._feature_metrics(self._gather(book.features(), 2, ids, total))
        ids = [i for i in ids if i < shown]
        pictures = self._gather(torch.cat(kept) if kept else None, 4, ids, shown).cpu()
        return Evaluation(metrics, pictures, self._captions(columns, shown))

    def _gather(self, rows: Tensor | None, dims: int, ids: Sequence[int], total: int) -> Tensor:
        """Rows ``[total, ...]`` of all processes by their ids; None where a process has none."""
        if self.runtime is None or self.runtime.world_size == 1:
            if rows is None:
                raise ValueError("rows: expected a tensor, got None")
            return rows
        shape = torch.zeros(1, dims, dtype=torch.int64, device=self.device)
        if rows is not None:
            shape[0] = torch.tensor(rows.shape)
        shape = self.runtime.accelerator.gather(shape).amax(0)
        if rows is None:
            rows = torch.empty(0, *shape[1:].tolist())
        return self.runtime.gather(
            rows.to(self.device), torch.tensor(ids, dtype=torch.int64), total
        )

    def _draw(self, rows: slice) -> Tensor:
        steps, prompts = self.table.num_steps, [p.text for p in self.samples[rows]]
        latents = torch.empty(
            (steps + 1, len(prompts), *self.sampler.latent_shape), device=self.device
        )
        keys = [("evaluation", i) for i in range(rows.start, rows.stop)]
        latents[0] = self.sampler.initial_latents(keys, self.config.seed)
        self.sampler.run(self.table, prompts, latents)
        return self.sampler.model.decode(latents[-1])

    def _feature_metrics(self, features: Tensor) -> dict[str, float]:
        metrics = {"diversity/pairwise": float(mean_pairwise_distance(features, self.group_ids))}
        if self.config.reference_images == "shapes" and self.rewards.features is not None:
            if self._real_features is None:
                scenes = [parse_prompt(p.text) for p in self.samples]
                real = render(scenes * 4, generator(self.config.seed, "real"))
                self._real_features = self.rewards.features(real.to(self.device))
            metrics["feature_distance"] = float(feature_distance(features, self._real_features))
        return metrics

    def _captions(self, scores: Mapping[str, Tensor], shown: int) -> list[str]:
        names = self.rewards.training_names
        columns = [scores[name][:shown].tolist() for name in names]
        return [
            caption(prompt.text, dict(zip(names, scores, strict=True)))
            for prompt, *scores in zip(self.samples[:shown], *columns, strict=True)
        ]
