"""The sampler: velocities from the model, fused SDE steps from `gardo_kernels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import SamplingConfig
from gardo.models.base import FlowModel, Schedule, Velocity
from gardo.models.embeddings import EMPTY, EmbeddingTable
from gardo.runtime.rng import derive_seed, generator, normal_rows
from gardo.sampling.plan import EpochPlan, batches, padded_rows


@dataclass(frozen=True)
class StepTable:
    """The schedule with the affine coefficients of every step, on the device.

    Attributes:
        timesteps: ``[num_steps]`` float32.
        coefficients: one `SDECoefficients` per step (0-d fields).
        stochastic: the steps with noise, in order; the only ones with a log-prob.
        trainable: the stochastic steps without the schedule's last, whose transition is so narrow
            that its log-prob says nothing.
    """

    timesteps: Tensor
    coefficients: tuple[gk.SDECoefficients, ...]
    stochastic: tuple[int, ...]
    trainable: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return len(self.coefficients)


def step_table(
    schedule: Schedule,
    device: torch.device,
    *,
    kind: str,
    noise_level: float,
    kl_scale: str = "exact",
    window: range | None = None,
) -> StepTable:
    """Coefficients of every step: noisy inside ``window`` (None: everywhere), else ODE."""
    sigmas, coefficients, stochastic = schedule.sigmas, [], []
    for step in range(schedule.num_steps):
        noisy = kind != "ode" and (window is None or step in window)
        coefficients.append(
            gk.sde_coefficients(
                sigmas[step],
                sigmas[step + 1],
                noise_level=noise_level,
                kind=kind if noisy else "ode",
                sigma_max=sigmas[1],
                kl_scale=kl_scale,
            )
        )
        if noisy and float(coefficients[-1].c) > 0:
            stochastic.append(step)
    return StepTable(
        schedule.timesteps.to(device),
        tuple(c.to(device) for c in coefficients),
        tuple(stochastic),
        tuple(step for step in stochastic if sigmas[step + 1] > 0),
    )


def sde_window(config: SamplingConfig, seed: int, epoch: int) -> range | None:
    """The epoch's window of noisy steps; None without windows.

    A window of ``sde_window`` steps lies anywhere in ``sde_window_range``, as in Flow-GRPO-Fast
    and MixGRPO; both end where the schedule ends.
    """
    if config.sde_window == 0:
        return None
    size = min(config.sde_window, config.num_steps)
    low, high = config.sde_window_range or (0, max(size, config.num_steps // 2))
    high = min(high, config.num_steps)
    low = min(low, high - size)
    first = low + derive_seed(seed, "window", epoch) % (high - low - size + 1)
    return range(first, first + size)


@dataclass
class Rollout:
    """The samples of one epoch on this process.

    Attributes:
        plan: which samples these are and when they are trained.
        prompts: ``n`` prompt texts, one per sample.
        latents: ``[num_steps + 1, n, *latent_shape]`` float32, from noise to the final latents.
        log_prob: ``[num_steps, n]`` float32; only the stochastic steps are meaningful.
        table: the steps that made them.
    """

    plan: EpochPlan
    prompts: Sequence[str]
    latents: Tensor
    log_prob: Tensor
    table: StepTable

    def __len__(self) -> int:
        return len(self.prompts)


class Sampler:
    """Draws trajectories with shared prompt embeddings, in batches of one fixed size."""

    def __init__(
        self,
        model: FlowModel,
        embeddings: EmbeddingTable,
        resolution: int,
        guidance_scale: float,
        batch_size: int,
    ) -> None:
        self.model = model
        self.embeddings = embeddings
        self.latent_shape = model.latent_shape(resolution)
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size

    @property
    def guided(self) -> bool:
        """Whether a second velocity, of the empty prompt, is combined with the prompt's."""
        return self.guidance_scale > 1.0 and not self.model.embedded_guidance

    @property
    def cfg_scale(self) -> float:
        """The scale that combines the two velocities; 1 where there is only one."""
        return self.guidance_scale if self.guided else 1.0

    def velocity(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Velocity:
        """Velocities of the model for rows of prompts, with the empty prompt's if guided."""
        uncond = self.embeddings([EMPTY] * len(prompts)) if self.guided else None
        cond = self.embeddings(prompts)
        return self.model.velocity(latents, timesteps, cond, uncond, self.guidance_scale)

    @torch.no_grad()
    def initial_latents(self, seeds: Sequence[tuple[int | str, ...]], seed: int) -> Tensor:
        """Noise ``[n, *latent_shape]``; equal keys give equal latents."""
        sources = [generator(seed, *k, device=self.model.device) for k in seeds]
        return normal_rows(sources, self.latent_shape)

    @torch.no_grad()
    def run(
        self,
        table: StepTable,
        prompts: Sequence[str],
        latents: Tensor,
        log_prob: Tensor | None = None,
        noise_sources: Sequence[torch.Generator] | None = None,
    ) -> None:
        """Sample one batch in place.

        Args:
            latents: ``[num_steps + 1, B, ...]`` whose first entry is the initial noise; the others
                are written.
            log_prob: ``[num_steps, B]``, written where a step is stochastic.
            noise_sources: a generator per row; needed when a step is stochastic.
        """
        batch = latents.shape[1]
        cond = self.embeddings(prompts)
        uncond = self.embeddings([EMPTY] * batch) if self.guided else None
        for step, coefficients in enumerate(table.coefficients):
            noise = None
            if step in table.stochastic:
                if noise_sources is None:
                    raise ValueError("noise_sources: expected a generator per row, got None")
                noise = normal_rows(noise_sources, self.latent_shape)
            timesteps = table.timesteps[step].expand(batch)
            v, v_uncond = self.model.velocity(
                latents[step], timesteps, cond, uncond, self.guidance_scale
            )
            out = gk.sde_step(
                v,
                latents[step],
                coefficients,
                noise=noise,
                velocity_uncond=v_uncond,
                guidance_scale=self.cfg_scale,
            )
            latents[step + 1] = out.prev_sample
            if log_prob is not None and step in table.stochastic:
                log_prob[step] = out.log_prob

    def rollout(
        self,
        plan: EpochPlan,
        prompts: Sequence[str],
        table: StepTable,
        seed: int,
        epoch: int,
        same_latent: bool,
    ) -> tuple[Rollout, Iterator[slice]]:
        """Allocate an epoch's trajectories and return the rollout with an iterator that fills it.

        The iterator yields the rows that have just been completed, so that they can be scored
        while the next ones are sampled. Each sample's noise depends on its id alone.
        """
        device, n = self.model.device, len(plan.sample_ids)
        shape = (table.num_steps + 1, n, *self.latent_shape)
        index = plan.prompt_index.tolist()
        rollout = Rollout(
            plan=plan,
            prompts=[prompts[i] for i in index],
            latents=torch.empty(shape, device=device),
            log_prob=torch.zeros(table.num_steps, n, device=device),
            table=table,
        )
        return rollout, self._fill(rollout, index, seed, epoch, same_latent)

    def _fill(
        self, rollout: Rollout, index: Sequence[int], seed: int, epoch: int, same_latent: bool
    ) -> Iterator[slice]:
        ids, device = rollout.plan.sample_ids.tolist(), self.model.device
        size = rollout.plan.batch_size(self.batch_size)
        for update in rollout.plan.updates:
            for rows in batches(update, size):
                padded = padded_rows(rows, size, torch.device("cpu")).tolist()
                keys = [
                    (epoch, "prompt", index[i]) if same_latent else (epoch, "sample", ids[i])
                    for i in padded
                ]
                valid = rows.stop - rows.start
                latents, log_prob = rollout.latents[:, rows], rollout.log_prob[:, rows]
                if valid < size:  # the padding must not overwrite other samples
                    steps = len(rollout.latents)
                    latents = latents.new_empty((steps, len(padded), *self.latent_shape))
                    log_prob = log_prob.new_zeros(steps - 1, len(padded))
                latents[0] = self.initial_latents([("latent", *k) for k in keys], seed)
                sources = [generator(seed, "noise", epoch, ids[i], device=device) for i in padded]
                prompts = [rollout.prompts[i] for i in padded]
                self.run(rollout.table, prompts, latents, log_prob, sources)
                if valid < size:
                    rollout.latents[:, rows] = latents[:, :valid]
                    rollout.log_prob[:, rows] = log_prob[:, :valid]
                yield rows
