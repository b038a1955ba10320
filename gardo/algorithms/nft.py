"""DiffusionNFT (arXiv 2509.16117): contrast good and bad samples on the forward process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.algorithms.batches import EpochData, MicroBatch
from gardo.algorithms.penalty import penalised
from gardo.algorithms.reference import RowVelocities, velocity_pass
from gardo.algorithms.shaping import ShapedEpoch
from gardo.algorithms.update import Algorithm
from gardo.config import TRAITS, Config, NFTConfig
from gardo.models.adapters import BEHAVIOUR, POLICY, REFERENCE
from gardo.models.base import Schedule
from gardo.rng import generator
from gardo.sampling.plan import batches
from gardo.sampling.rollout import Rollout, Sampler
from gardo.types import UserError


@dataclass(frozen=True)
class NoisedSamples:
    """Some rows at one level of noise, ``latents = (1 - t) * clean_latents + t * noise``.

    Attributes:
        latents, clean_latents: ``[B, *latent_shape]`` float32.
        t: ``[B]`` float32, the share of noise.
        timesteps: ``[B]`` float32, what the model is told of it.
        behaviour_velocity: of the behaviour policy, ``[B, *latent_shape]`` float32.
    """

    latents: Tensor
    clean_latents: Tensor
    t: Tensor
    timesteps: Tensor
    behaviour_velocity: Tensor


@dataclass
class NFTData(EpochData):
    """One epoch of noised samples.

    The rollout's latents have been overwritten: entry ``k < len(steps)`` holds the sample's
    ``k``-th noised latent, the last one still its clean latent.

    Attributes:
        behaviour: velocities of the behaviour policy, of all rows; None where the process has none.
        t: ``[len(steps), n]`` float32, the share of noise in each noised latent.
        timesteps: ``[len(steps), n]`` float32, what the model is told of it.
    """

    behaviour: RowVelocities | None
    t: Tensor
    timesteps: Tensor

    def at(self, k: int, rows: Tensor) -> NoisedSamples:
        if self.behaviour is None:
            raise ValueError("data: expected velocities of the behaviour policy, got None")
        return NoisedSamples(
            self.rollout.latents_at(k, rows),
            self.rollout.latents_at(-1, rows),
            self.t[k, rows],
            self.timesteps[k, rows],
            self.behaviour.rows(k, rows),
        )


class NFT(Algorithm[NFTData]):
    """Updates the policy from `NFTData`, with GARDO's KL on the velocities.

    Rollouts are drawn by the behaviour policy, a slow copy of the policy, without noise and without
    log-probs. Guidance is not part of the loss: what it would add, the policy learns.
    """

    adapter_names = (POLICY, REFERENCE, BEHAVIOUR)
    sampled_by = BEHAVIOUR
    traits = TRAITS["nft"]
    extra_forwards = 1

    @classmethod
    def count_trained_steps(cls, config: Config) -> int:
        return count_noise_levels(config.sampling.num_steps, config.train.timestep_fraction)

    def prepare(
        self, rollout: Rollout, shaped: ShapedEpoch, schedule: Schedule, seed: int, epoch: int
    ) -> NFTData:
        """Noise the samples; run the behaviour policy on all, the reference on penalised rows."""
        refuse_guidance(self.sampler)
        chosen = drawn_steps(
            rollout.plan.sample_ids.tolist(),
            schedule.num_steps,
            self.train.timestep_fraction,
            self.train.timestep_selection,
            seed,
            epoch,
        )
        device = rollout.log_prob.device
        t = schedule.sigmas[chosen].to(device)
        timesteps = schedule.timesteps[chosen].to(device)
        steps = range(len(chosen))
        add_noise(rollout, t, self.sampler.batch_size, seed, epoch)
        with self.adapters.use(BEHAVIOUR):
            behaviour = velocity_pass(
                self.sampler, rollout, range(len(rollout)), steps, timesteps, self.runtime
            )
        batch_size = self.train.batch_size
        shaped = penalised(self.algorithm, batch_size, shaped, rollout.plan, self.runtime)
        data = NFTData(rollout, shaped, None, steps, behaviour, t, timesteps)
        return self._with_reference(data, timesteps)

    def loss(self, data: NFTData, batch: MicroBatch, k: int) -> gk.NFTLoss:
        x, n = data.at(k, batch.rows), batch.size
        velocity = self.sampler.velocity(x.latents, x.timesteps, batch.conditioning).cond
        reference = data.ref_velocity(k, batch)
        # a sample without advantage has a loss, too: the padding must go
        return gk.nft_loss(
            velocity[:n],
            x.behaviour_velocity[:n],
            x.clean_latents[:n],
            x.latents[:n],
            x.t[:n],
            batch.advantage[:n],
            beta=self.algorithm.nft.beta,
            adv_clip=self.algorithm.adv_clip,
            gate=batch.gate[:n],
            ref_velocity=None if reference is None else reference[:n],
            kl_coef=self.strength.coefficient * batch.kl_weight,
            reduction="sum",
        )

    def finish_epoch(self, optimizer_steps: int) -> dict[str, float]:
        """The behaviour policy follows the policy, the slower the longer training has lasted."""
        keep = behaviour_decay(self.algorithm.nft, optimizer_steps)
        self.adapters.copy(POLICY, BEHAVIOUR, keep)
        return {"behaviour/decay": keep}


def behaviour_decay(config: NFTConfig, optimizer_steps: int) -> float:
    """What the behaviour policy keeps of itself, ``min(rate * max(steps - start, 0), max)``.

    DiffusionNFT's published schedules are (rate, start, max) = (0.001, 0, 0.5) and
    (0.0075, 75, 0.999); with rate 0 it is always the policy of the epoch before.
    """
    elapsed = max(optimizer_steps - config.decay_start, 0)
    return min(config.decay_rate * elapsed, config.decay_max)


def count_noise_levels(num_steps: int, fraction: float) -> int:
    """How many entries of the schedule each sample is trained at: a share of them, at least one."""
    return max(1, int(num_steps * fraction + 1e-9))


def drawn_steps(
    sample_ids: Sequence[int],
    num_steps: int,
    fraction: float,
    selection: str,
    seed: int,
    epoch: int,
) -> Tensor:
    """Which entries of the schedule each sample is noised to, ``[count, n]`` int64 on the CPU.

    ``count`` is this share of the schedule, at least one. With ``random`` each sample has an order
    of its own, which depends on its id alone; with ``first`` all take the noisiest ones.
    """
    count, columns = count_noise_levels(num_steps, fraction), []
    for sample in sample_ids:
        if selection == "first":
            columns.append(torch.arange(count))
        else:
            source = generator(seed, "forward steps", epoch, sample)
            columns.append(torch.randperm(num_steps, generator=source)[:count])
    return torch.stack(columns, 1) if columns else torch.empty(count, 0, dtype=torch.int64)


@torch.no_grad()
def add_noise(rollout: Rollout, t: Tensor, batch_size: int, seed: int, epoch: int) -> None:
    """Overwrite the trajectories with noised samples, ``x_t = (1 - t)*x0 + t*noise``.

    The trajectory is not needed any more and its memory has the right size. A sample's noise
    depends on its id alone.

    Args:
        t: ``[count, n]``, at most as many as the rollout has steps.
        batch_size: rows at a time.
    """
    latents, device, ids = rollout.latents, rollout.log_prob.device, rollout.plan.sample_ids
    for rows in batches(slice(0, len(rollout)), batch_size):
        x0 = rollout.latents_at(-1, rows)
        for column, sample in enumerate(ids[rows].tolist()):
            source = generator(seed, "forward noise", epoch, sample, device=device)
            row = rows.start + column
            share = t[:, row].reshape(-1, *[1] * (x0.dim() - 1))
            noise = torch.empty((len(t), *x0.shape[1:]), device=device).normal_(generator=source)
            latents[: len(t), row] = ((1 - share) * x0[column] + share * noise).to(latents.device)


def refuse_guidance(sampler: Sampler) -> None:
    """UserError if the sampler combines two velocities, of which the loss knows only one."""
    if sampler.guided:
        raise UserError(
            "algorithm.name: nft trains the velocity of the prompt alone and draws with it; "
            f"expected sampling.guidance_scale 1, got {sampler.guidance_scale:g}"
        )
