"""The same epoch the way published trainers run it, as a baseline.

Written for this benchmark from the formulas and from how Flow-GRPO and the published GARDO code
order the work: prompts encoded anew for every batch, each denoising step and log-probability as
separate torch operations, float32 weights that autocast converts in every forward, rewards shaped
in numpy on the host, and inside the training step a forward of the reference for every sample and
timestep, although only gated samples use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.clock import StageClock
from benchmarks.our_epoch import score
from benchmarks.workload import EPOCH, Workload
from gardo.algorithms.ema import EMA
from gardo.algorithms.reference import trained_steps
from gardo.families import FAMILIES
from gardo.models.adapters import POLICY, REFERENCE
from gardo.models.embeddings import EMPTY
from gardo.rewards.scoring import ScoreBook
from gardo.rng import derive_seed
from gardo.sampling.plan import batches
from gardo.types import PromptEmbeds, UserError

Samples = dict[str, Tensor]


def check_supported(work: Workload) -> None:
    """Refuse settings for which the published code does other work. Raises UserError."""
    config, train = work.config.algorithm, work.config.train
    sizes = {rows.stop - rows.start for rows in work.plan.updates}
    smallest = work.plan.batch_size(train.batch_size)
    for key, value, wanted in (
        ("algorithm.name", config.name, "grpo"),
        ("algorithm.ratio_norm", config.ratio_norm, "none"),
        ("model.full_finetune", work.config.model.full_finetune, False),
        ("sampling.sde", work.config.sampling.sde, "flow"),
        ("algorithm.advantage_norm", config.advantage_norm, "none"),
        ("algorithm.diversity", config.diversity, True),
        ("samples of an update that fill no training batch", max(n % smallest for n in sizes), 0),
    ):
        if value != wanted:
            raise UserError(f"--baseline: {key}: expected {wanted}, got {value}")


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss at one timestep and the figures that are logged of it, each 0-d."""

    loss: Tensor
    policy: Tensor
    kl: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class OfficialEpoch:
    """Sampling, shaping and training of one epoch on one process."""

    def __init__(self, work: Workload) -> None:
        check_supported(work)
        self.work = work
        config = work.config
        sampling = config.sampling
        guided = FAMILIES[work.model.family].guided(sampling.guidance_scale)
        self.uncond = self.encode([EMPTY]) if guided else None  # once per run, here too
        self.noise_level, self.guidance = sampling.noise_level, sampling.guidance_scale
        work.model.schedule(sampling.num_steps, work.resolution)  # sets the scheduler's timesteps
        self.scheduler: Any = work.model.pipeline.scheduler
        self.scheduler.timesteps = self.scheduler.timesteps.to(work.device)
        self.sigmas = self.scheduler.sigmas.to(work.device)
        self.steps = trained_steps(
            work.table,
            config.train.timestep_fraction,
            config.train.timestep_selection,
            derive_seed(config.seed, "steps", EPOCH),
        )
        self.optimizer = work.runtime.accelerator.prepare(work.optimizer(fused=False))
        train = config.train
        self.ema = EMA(work.adapters.parameters(POLICY), train) if train.ema else None
        self.reference_rows = 0
        self.transformer_dtype: torch.dtype | None = None

    def run(self, clock: StageClock) -> dict[str, float]:
        """Run the epoch from the workload's start; returns the means of what is logged."""
        work, plan = self.work, self.work.plan
        work.restore()
        self.reference_rows = 0
        self.transformer_dtype = _frozen_dtype(work)
        torch.manual_seed(work.config.seed)
        index, book = plan.prompt_index.tolist(), ScoreBook()
        shape = work.model.latent_shape(work.resolution)
        per_prompt = torch.randn(len(work.prompts), *shape, device=work.device)
        collected: list[Samples] = []
        size = plan.batch_size(work.config.sampling.batch_size)
        for rows in batches(slice(0, len(index)), size):
            with clock.stage("prompts"):
                cond = self.encode([work.texts[i] for i in index[rows]])
            with clock.stage("sample"):
                if work.config.sampling.same_latent:
                    start = per_prompt[index[rows]]
                else:
                    start = torch.randn(len(index[rows]), *shape, device=work.device)
                samples = self.sample(start, cond)
            with clock.stage("decode"):
                images = work.model.decode(samples["latents"][:, -1])
            with clock.stage("score"):
                score(work, book, images, index[rows])
            collected.append(samples)
        with clock.stage("shape"):
            data = self.collate(collected)
            advantage, gate = self.shape(book)
            data["advantages"], data["gate"] = advantage, gate
        with clock.stage("update"):
            return self.train(data)

    def forget(self) -> None:
        """Free the optimizer's state, so that it does not count among another's memory."""
        self.optimizer.state.clear()

    # --- rollout ---------------------------------------------------------------------------------

    def encode(self, texts: list[str]) -> PromptEmbeds:
        """Encode a row per sample, although samples share prompts; random ones are looked up."""
        if self.work.encodes:
            return self.work.model.encode_prompts(texts)
        return self.work.embeddings(texts)

    @torch.no_grad()
    def sample(self, latents: Tensor, cond: PromptEmbeds, noise: Tensor | None = None) -> Samples:
        """A batch from noise ``[B, ...]`` to final latents; ``noise [T, B, ...]`` or drawn.

        Returns latents ``[B, T+1, ...]``, log-probs and timesteps ``[B, T]`` and the embeddings.
        """
        trajectory, log_probs = [latents], []
        for step, timestep in enumerate(self.scheduler.timesteps):
            timesteps = timestep.expand(len(latents))
            velocity = self.velocity(latents, timesteps, cond)
            if step in self.work.table.stochastic:
                z = torch.randn_like(latents) if noise is None else noise[step]
                mean, _, spread = self.transition(velocity, latents, timesteps)
                latents = mean + spread * z
                log_probs.append(log_prob(latents, mean, spread))
            else:
                change = self.sigmas[step + 1] - self.sigmas[step]
                latents = latents + change * velocity.float()
                log_probs.append(latents.new_zeros(len(latents)))
            trajectory.append(latents)
        samples = {
            "latents": torch.stack(trajectory, dim=1),
            "log_probs": torch.stack(log_probs, dim=1),
            "timesteps": self.scheduler.timesteps.repeat(len(latents), 1),
        }
        return samples | {f"embeds.{name}": t for name, t in cond.tensors.items()}

    def velocity(self, latents: Tensor, timesteps: Tensor, cond: PromptEmbeds) -> Tensor:
        """The guided velocity ``[B, ...]``."""
        uncond = self.uncond
        if uncond is not None:
            tensors = uncond.tensors.items()
            uncond = PromptEmbeds({k: t.expand(len(latents), *t.shape[1:]) for k, t in tensors})
        v, u, _ = self.work.model.velocity(latents, timesteps, cond, uncond, self.guidance)
        return v if u is None else u + self.guidance * (v - u)

    def transition(
        self, velocity: Tensor, sample: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the SDE step, its std without the step size, and with it.

        The step of Flow-GRPO (arXiv 2505.05470) as separate operations; the schedule is
        searched for each row's timestep, which on a GPU makes the host wait.
        """
        steps = [self.scheduler.index_for_timestep(t) for t in timesteps]
        shape = (-1, *[1] * (sample.ndim - 1))
        s = self.sigmas[steps].view(shape)
        s_next = self.sigmas[[step + 1 for step in steps]].view(shape)
        velocity, sample = velocity.float(), sample.float()
        dt = s_next - s
        largest = self.sigmas[1]
        std = torch.sqrt(s / (1 - torch.where(s == 1, largest, s))) * self.noise_level
        mean = sample * (1 + std**2 / (2 * s) * dt)
        mean = mean + velocity * (1 + std**2 * (1 - s) / (2 * s)) * dt
        return mean, std, std * torch.sqrt(-dt)

    # --- shaping ---------------------------------------------------------------------------------

    def collate(self, collected: list[Samples]) -> Samples:
        """All samples of the epoch; states and next states are kept apart, as copies."""
        data = {k: torch.cat([s[k] for s in collected]) for k in collected[0] if k != "latents"}
        data["latents"] = torch.cat([s["latents"][:, :-1] for s in collected])
        data["next_latents"] = torch.cat([s["latents"][:, 1:] for s in collected])
        return data

    def shape(self, book: ScoreBook) -> tuple[Tensor, Tensor]:
        """Advantages ``[N, T]`` and the gate ``[N]``, from numpy statistics per prompt.

        The published gate ranks in the other direction than this library's and its share is fixed
        at a tenth; which samples it takes does not change the work of this epoch.
        """
        work, rewards = self.work, self.work.rewards
        scores = {name: book.scores(name).double() for name in rewards.training_names}
        aux = [rewards.maximised(name, scores[name]).cpu().numpy() for name in rewards.aux]
        proxy = rewards.proxy_scores(scores).cpu().numpy()
        features = book.features()
        if features is None:
            raise UserError("rewards.features: expected a feature extractor, got none")
        texts = np.array(work.texts)[work.plan.prompt_index.numpy()]
        proxy = np.repeat(proxy[:, None], work.table.num_steps, axis=1)
        advantage, gate = eager.shaping(features.cpu().numpy(), proxy, np.stack(aux), texts)
        device = work.device
        return torch.as_tensor(advantage).float().to(device), torch.as_tensor(gate).to(device)

    # --- training --------------------------------------------------------------------------------

    def train(self, data: Samples) -> dict[str, float]:
        """All optimizer steps of the epoch over shuffled samples."""
        work, train = self.work, self.work.config.train
        parameters = list(work.adapters.parameters(POLICY).values())
        order = torch.randperm(len(data["latents"]), device=work.device)
        data = {name: tensor[order] for name, tensor in data.items()}
        logged = []
        for rows in work.plan.updates:
            micro_batches = [
                {name: tensor[part] for name, tensor in data.items()}
                for part in batches(rows, work.plan.batch_size(train.batch_size))
            ]
            logged += self.accumulate(micro_batches, self.steps)
            work.runtime.accelerator.clip_grad_norm_(parameters, train.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step()
        return {
            name: float(torch.stack([getattr(entry, name) for entry in logged]).mean())
            for name in Loss.__dataclass_fields__
        }

    def accumulate(self, micro_batches: list[Samples], steps: list[int]) -> list[Loss]:
        """Add up the gradients of an update: the mean over micro-batches and timesteps."""
        logged = []
        for batch in micro_batches:
            for step in steps:
                out = self.loss(batch, step)
                weight = 1 / (len(micro_batches) * len(steps))
                self.work.runtime.accelerator.backward(out.loss * weight)
                logged.append(out)
        return [Loss(**{k: v.detach() for k, v in vars(entry).items()}) for entry in logged]

    def loss(self, batch: Samples, step: int) -> Loss:
        """The clipped policy loss and the KL to the reference, which runs on the whole batch."""
        config = self.work.config.algorithm
        latents, prev = batch["latents"][:, step], batch["next_latents"][:, step]
        timesteps = batch["timesteps"][:, step]
        cond = PromptEmbeds(
            {k.removeprefix("embeds."): t for k, t in batch.items() if k.startswith("embeds.")}
        )
        velocity = self.velocity(latents, timesteps, cond)
        mean, std, spread = self.transition(velocity, latents, timesteps)
        new_log_prob = log_prob(prev, mean, spread)
        kl = torch.zeros_like(new_log_prob)
        if config.kl_coef > 0:
            rows_before = self.work.model.rows
            with torch.no_grad(), self.work.adapters.use(REFERENCE):
                velocity = self.velocity(latents, timesteps, cond)
                reference, _, _ = self.transition(velocity, latents, timesteps)
                log_prob(prev, reference, spread)  # computed with the mean, and not used
            self.reference_rows += self.work.model.rows - rows_before
            scale = std if config.kl_scale == "official" else spread
            kl = ((mean - reference) ** 2).flatten(1).mean(1) / (2 * scale.flatten() ** 2)
        advantage = batch["advantages"][:, step].clamp(-config.adv_clip, config.adv_clip)
        old = batch["log_probs"][:, step]
        ratio = torch.exp(new_log_prob - old)
        low, high = _pair(config.clip_range)
        unclipped = -advantage * ratio
        clipped = -advantage * torch.clamp(ratio, 1 - low, 1 + high)
        policy = torch.maximum(unclipped, clipped).mean()
        gate = batch["gate"].to(kl.dtype)
        count = len(gate) if config.kl_reduction == "batch" else gate.sum().clamp(min=1)
        penalty = (kl * gate).sum() / count
        return Loss(
            loss=policy + config.kl_coef * penalty,
            policy=policy,
            kl=penalty,
            clip_fraction=((ratio < 1 - low) | (ratio > 1 + high)).float().mean(),
            approx_kl=0.5 * ((new_log_prob - old) ** 2).mean(),
        )


def log_prob(prev: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Mean log-density over the latent dimensions, ``[B]``."""
    density = (
        -((prev.detach() - mean) ** 2) / (2 * spread**2)
        - torch.log(spread)
        - math.log(math.sqrt(2 * math.pi))
    )
    return density.mean(dim=tuple(range(1, density.ndim)))


def _pair(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    return clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)


def _frozen_dtype(work: Workload) -> torch.dtype:
    return next(p for n, p in work.model.transformer.named_parameters() if "lora_" not in n).dtype
