"""The sampler: batches of trajectories with shared prompt embeddings, filled into a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.families import FAMILIES
from gardo.models.base import FlowModel, Velocity
from gardo.models.embeddings import EMPTY, EmbeddingTable
from gardo.rng import generator, normal_rows
from gardo.sampling.graph import GraphedTrajectories
from gardo.sampling.plan import EpochPlan, padded_rows
from gardo.sampling.steps import StepTable
from gardo.sampling.trajectory import Conditioning, Trajectory, sample_trajectory


def noise_source(seed: int, epoch: int, sample_id: int, device: torch.device) -> torch.Generator:
    """What draws the noise of a sample's stochastic steps, one after the other."""
    return generator(seed, "noise", epoch, sample_id, device=device)


@dataclass(frozen=True)
class Transition:
    """One step of some rows' trajectories: what sampling did and training judges again.

    Attributes:
        latents, next_latents: ``[B, *latent_shape]`` float32, before and after the step.
        timesteps: ``[B]`` float32, what the model is told.
        coefficients: of the step, 0-d fields.
        old_log_prob: ``[B]`` float32, by the policy that sampled.
        noise: ``[B, *latent_shape]`` float32, what sampling added; None where no loss reads it.
    """

    latents: Tensor
    next_latents: Tensor
    timesteps: Tensor
    coefficients: gk.SDECoefficients
    old_log_prob: Tensor
    noise: Tensor | None = None

    def log_prob(self, velocity: Velocity) -> Tensor:
        """By a policy that predicts this velocity, ``[B]`` float32, differentiable in it."""
        return gk.sde_log_prob(
            velocity.cond,
            self.latents,
            self.next_latents,
            self.coefficients,
            velocity_uncond=velocity.uncond,
            guidance_scale=velocity.guidance_scale,
        )


@dataclass
class Rollout:
    """The samples of one epoch on this process.

    Attributes:
        plan: which samples these are and when they are trained.
        prompts: ``n`` prompt texts, one per sample.
        latents: ``[num_steps + 1, n, *latent_shape]`` float32, from noise to the final latents; in
            CPU memory if trajectories are offloaded. Read them through `latents_at`.
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

    def latents_at(self, step: int | Tensor, rows: Tensor | slice) -> Tensor:
        """``[len(rows), *latent_shape]`` on the device that computes."""
        home = self.latents.device
        where = [i.to(home) if isinstance(i, Tensor) else i for i in (step, rows)]
        return self.latents[where[0], where[1]].to(self.log_prob.device, non_blocking=True)

    def transition(self, step: int, rows: Tensor, noise: Tensor | None = None) -> Transition:
        """One denoising step of some rows, with the noise that it added if known."""
        return Transition(
            self.latents_at(step, rows),
            self.latents_at(step + 1, rows),
            self.table.timesteps[step].expand(len(rows)),
            self.table.coefficients[step],
            self.log_prob[step, rows],
            noise,
        )


class Sampler:
    """Draws trajectories with shared prompt embeddings, in batches of one fixed size."""

    def __init__(
        self,
        model: FlowModel,
        embeddings: EmbeddingTable,
        resolution: int,
        guidance_scale: float,
        batch_size: int,
        graphs: GraphedTrajectories | None = None,
        offload: bool = False,
    ) -> None:
        """With ``graphs`` trajectories are replayed; with ``offload`` they wait in CPU memory."""
        self.model = model
        self.embeddings = embeddings
        self.latent_shape = model.latent_shape(resolution)
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.graphs = graphs
        self.offload = offload

    @property
    def guided(self) -> bool:
        """Whether a second velocity, of the empty prompt, is combined with the prompt's."""
        return FAMILIES[self.model.family].guided(self.guidance_scale)

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of rows of prompts, with the empty prompt's if guided."""
        uncond = self.embeddings([EMPTY] * len(prompts)) if self.guided else None
        return Conditioning(self.embeddings(prompts), uncond)

    def velocity(
        self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str] | Conditioning
    ) -> Velocity:
        """Velocities of the model for rows of prompts, with the empty prompt's if guided.

        A loop over timesteps looks the prompts up once, with `condition`.
        """
        c = prompts if isinstance(prompts, Conditioning) else self.condition(prompts)
        return self.model.velocity(latents, timesteps, c.cond, c.uncond, self.guidance_scale)

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
            log_prob: ``[num_steps, B]``, written; 0 where a step has no noise.
            noise_sources: a generator per row; needed when a step is stochastic.
        """
        if log_prob is None:
            log_prob = latents.new_zeros(table.num_steps, latents.shape[1])
        noise = self._noise(table, latents, noise_sources)
        trajectory = Trajectory(latents, log_prob, noise, self.condition(prompts), table)
        draw = sample_trajectory if self.graphs is None else self.graphs.run
        draw(self.model, trajectory, self.guidance_scale)
        for step in set(range(table.num_steps)) - set(table.stochastic):
            log_prob[step] = 0.0

    def _noise(
        self, table: StepTable, latents: Tensor, sources: Sequence[torch.Generator] | None
    ) -> Tensor | None:
        """All noise of a batch, drawn ahead, because a graph draws none."""
        if not table.stochastic:
            return None
        if sources is None:
            raise ValueError("noise_sources: expected a generator per row, got None")
        noise = torch.zeros_like(latents[1:])
        for step in table.stochastic:
            noise[step] = normal_rows(sources, self.latent_shape)
        return noise

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
            latents=self._allocate(shape),
            log_prob=torch.zeros(table.num_steps, n, device=device),
            table=table,
        )
        return rollout, self._fill(rollout, index, seed, epoch, same_latent)

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        device = self.model.device
        if not self.offload:
            return torch.empty(shape, device=device)
        return torch.empty(shape, pin_memory=device.type == "cuda")

    def _fill(
        self, rollout: Rollout, index: Sequence[int], seed: int, epoch: int, same_latent: bool
    ) -> Iterator[slice]:
        ids, device = rollout.plan.sample_ids.tolist(), self.model.device
        size = rollout.plan.batch_size(self.batch_size)
        for update in range(len(rollout.plan.updates)):
            for rows in rollout.plan.batches(update, size):
                padded = padded_rows(rows, size, torch.device("cpu")).tolist()
                keys = [
                    (epoch, "prompt", index[i]) if same_latent else (epoch, "sample", ids[i])
                    for i in padded
                ]
                valid = rows.stop - rows.start
                in_place = valid == size and rollout.latents.device == device
                if in_place:
                    latents, log_prob = rollout.latents[:, rows], rollout.log_prob[:, rows]
                else:  # the padding must not overwrite other samples
                    shape = (len(rollout.latents), size, *self.latent_shape)
                    latents = torch.empty(shape, device=device)
                    log_prob = rollout.log_prob.new_zeros(len(rollout.log_prob), size)
                latents[0] = self.initial_latents([("latent", *k) for k in keys], seed)
                sources = [noise_source(seed, epoch, ids[i], device) for i in padded]
                prompts = [rollout.prompts[i] for i in padded]
                self.run(rollout.table, prompts, latents, log_prob, sources)
                if not in_place:
                    rollout.latents[:, rows] = latents[:, :valid]
                    rollout.log_prob[:, rows] = log_prob[:, :valid]
                if valid:
                    yield rows
