"""Do both ways of running an epoch compute the same numbers? Asked before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.official_epoch import OfficialEpoch
from benchmarks.workload import Workload
from gardo.algorithms.grpo import GRPO, TrainingData
from gardo.algorithms.reference import reference_pass
from gardo.algorithms.shaping import ShapedEpoch, Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.models.adapters import POLICY
from gardo.rewards.scoring import ScoreBook
from gardo.rng import derive_seed
from gardo.sampling.plan import plan_epoch
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.trajectory import Trajectory, sample_trajectory
from gardo.types import PromptEmbeds

# Largest error of each comparison, relative to the largest value (gradients: of the norms).
TOLERANCES = {"latents": 1e-4, "log_prob": 1e-4, "advantage": 1e-5, "loss": 1e-4, "gradient": 1e-3}
BATCH = 2  # samples per micro-batch; two of them are compared
STEPS = 2


class VerificationFailed(Exception):
    """The baseline and the library differ, so their times cannot be compared."""


def verify(work: Workload) -> dict[str, float]:
    """Compare sampling, shaping, loss and gradients on the same inputs, all in float32.

    The loss is compared where both define the same one: with the published mean of the KL over
    the gated samples of each micro-batch (``kl_reduction: microbatch``). The library's default is
    their mean over the update, which takes the same time.

    Returns:
        the largest error of each comparison, relative (see ``TOLERANCES``).

    Raises:
        VerificationFailed: one is above its tolerance, or not a number.
    """
    errors = {"advantage": _compare_shaping(work)}
    with _float32(work) as wide:
        errors |= _compare_epoch(wide)
    wrong = [
        f"{name} by {error:.1e} (allowed: {TOLERANCES[name]:.0e})"
        for name, error in errors.items()
        if not error <= TOLERANCES[name]
    ]
    if wrong:
        raise VerificationFailed("the baseline differs from the library in " + ", ".join(wrong))
    return {name: errors[name] for name in TOLERANCES}


class _Float32Embeddings:
    def __init__(self, embeddings: Any) -> None:
        self.embeddings = embeddings

    def __call__(self, prompts: list[str]) -> PromptEmbeds:
        embeds = self.embeddings(prompts)
        return PromptEmbeds({name: tensor.float() for name, tensor in embeds.tensors.items()})


@contextmanager
def _float32(work: Workload) -> Iterator[Workload]:
    """The workload without autocast; its weights have to be stored in float32."""
    algorithm = work.config.algorithm.model_copy(update={"kl_reduction": "microbatch"})
    train = work.config.train.model_copy(update={"batch_size": BATCH, "max_grad_norm": 1e30})
    config = work.config.model_copy(update={"algorithm": algorithm, "train": train})
    dtype, rows = work.model.dtype, work.model.rows
    embeddings: Any = _Float32Embeddings(work.embeddings)
    work.model.dtype = torch.float32
    try:
        # the encoders work in their own precision: random or table embeddings serve here
        yield replace(work, config=config, embeddings=embeddings, encodes=False)
    finally:
        work.model.dtype, work.model.rows = dtype, rows


class _GradientRecorder(torch.optim.SGD):
    """Keeps the gradients of the step that it is asked for, and changes nothing."""

    gradients: list[Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def _compare_epoch(work: Workload) -> dict[str, float]:
    config, table = work.config, work.table
    count = min(2, len(work.prompts))
    plan = plan_epoch(count, 2 * BATCH // count, updates=1)
    texts = [work.texts[i] for i in plan.prompt_index.tolist()]
    sampler = work.sampler()
    source = torch.Generator(work.device).manual_seed(derive_seed(config.seed, "verify"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=work.device)

    # sampling
    latents = normal(table.num_steps + 1, len(texts), *sampler.latent_shape)
    noise = normal(table.num_steps, len(texts), *sampler.latent_shape)
    for step in set(range(table.num_steps)) - set(table.stochastic):
        noise[step] = 0.0
    official = OfficialEpoch(replace(work, plan=plan))
    cond = sampler.condition(texts).cond
    theirs = official.sample(latents[0].clone(), cond, noise)
    log_prob = torch.zeros(table.num_steps, len(texts), device=work.device)
    with torch.no_grad():
        sample_trajectory(
            work.model,
            Trajectory(latents, log_prob, noise, sampler.condition(texts), table),
            sampler.guidance_scale,
        )
    stochastic = list(table.stochastic)
    errors = {
        "latents": _error(theirs["latents"].transpose(0, 1), latents),
        "log_prob": _error(theirs["log_probs"].T[stochastic], log_prob[stochastic]),
    }

    # training, on the trajectories of ours; half of the ratios leave the clip range, on the side
    # where that stops the gradient in the first step, on the other in the second
    low, high = _clip_range(work)
    steps = official.steps[:STEPS]
    shift = torch.tensor([0.5, -0.5, 3.0, -3.0], device=work.device) * min(low, high)
    for number, step in enumerate(steps):
        log_prob[step] += (-1) ** number * shift
    advantage = torch.tensor([1.0, -0.7, -1.3, 0.4], device=work.device)
    gate = torch.tensor([True, False, True, True], device=work.device)
    shaped = ShapedEpoch(advantage, gate, (0, 2, 3), (3,), {})
    rollout = Rollout(plan, texts, latents, log_prob, table)
    our_loss, our_gradients = _ours(work, sampler, rollout, shaped, steps)
    samples = {
        "latents": latents[:-1].transpose(0, 1),
        "next_latents": latents[1:].transpose(0, 1),
        "log_probs": log_prob.T,
        "timesteps": theirs["timesteps"],
        "advantages": shaped.advantage[:, None].expand(-1, table.num_steps),
        "gate": gate,
    }
    samples |= {f"embeds.{name}": tensor for name, tensor in cond.tensors.items()}
    halves = [slice(0, BATCH), slice(BATCH, 2 * BATCH)]
    logged = official.accumulate([{k: t[h] for k, t in samples.items()} for h in halves], steps)
    their_loss = torch.stack([entry.loss for entry in logged]).mean()
    gradients = []
    for parameter in work.adapters.parameters(POLICY).values():
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    ours = torch.cat([g.flatten() for g in our_gradients])
    difference = torch.cat([g.flatten() for g in gradients]) - ours
    errors["loss"] = abs(float(their_loss) - our_loss) / max(abs(our_loss), 1e-12)
    errors["gradient"] = float(difference.norm() / ours.norm())
    return errors


def _ours(
    work: Workload, sampler: Sampler, rollout: Rollout, shaped: ShapedEpoch, steps: list[int]
) -> tuple[float, list[Tensor]]:
    """The library's loss and gradients of one update."""
    reference = reference_pass(sampler, work.adapters, rollout, shaped.gated_rows, steps)
    recorder = _GradientRecorder(work.adapters.parameters(POLICY).values(), lr=0.0)
    config, stats = work.config, UpdateStats()
    grpo = GRPO(config.algorithm, config.train, sampler, work.adapters, recorder, work.runtime)
    grpo.update(TrainingData(rollout, shaped, reference, steps), 0, stats)
    metrics, _ = stats.metrics(work.runtime)
    return metrics["loss/total"], recorder.gradients


def _compare_shaping(work: Workload) -> float:
    """Advantages of random scores and features: numpy on the host against the library."""
    source = torch.Generator().manual_seed(derive_seed(work.config.seed, "shaping"))
    n, book = len(work.plan.sample_ids), ScoreBook()
    names = work.rewards.training_names
    scores = {name: torch.rand(n, generator=source).to(work.device) for name in names}
    book.add(scores, torch.randn(n, 64, generator=source).to(work.device))
    shaped = Shaper(work.config.algorithm, work.rewards)(book, work.plan, work.runtime)
    theirs, _ = OfficialEpoch(work).shape(book)
    return _error(theirs[:, 0], shaped.advantage)


def _clip_range(work: Workload) -> tuple[float, float]:
    clip_range = work.config.algorithm.clip_range
    return clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)


def _error(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())
