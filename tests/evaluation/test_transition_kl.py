"""The KL to the base against the kernel that trains with it, a long calculation, and zero."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import gardo_kernels as gk
from gardo.config import load_config
from gardo.evaluation.drawing import Draw, Painter, shared_noise, transition_kl
from gardo.models.adapters import build_adapters
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import load_model
from gardo.rng import normal_rows
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.types import Prompt

TEXTS = ("two red circles", "one blue square")
ETA, STEPS = 0.7, 4


@pytest.fixture(scope="module")
def moved():
    """A model whose adapter has moved, a copy of the model without one, and their samplers."""
    config = load_config("tiny")
    models = [load_model(config.model, torch.device("cpu"), "fp32") for _ in range(2)]
    adapters = build_adapters(models[0], config.model, seed=0, names=("policy",))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    tables = [EmbeddingTable(model, TEXTS) for model in models]
    for model in models:
        model.release_text_encoders()

    def samplers(guidance: float) -> list[Sampler]:
        return [Sampler(m, t, 24, guidance, 3) for m, t in zip(models, tables, strict=True)]

    return samplers


def table_of(sampler, kind="flow"):
    schedule = sampler.model.schedule(STEPS, 24)
    return schedule, step_table(schedule, torch.device("cpu"), kind=kind, noise_level=ETA)


def noises(sampler):
    shape = sampler.latent_shape
    start = normal_rows(shared_noise("latent", TEXTS, [3, 4]), shape)
    sources = shared_noise("kl", TEXTS, [3, 4])
    return start, torch.stack([normal_rows(sources, shape) for _ in range(STEPS)])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_equals_the_formula_in_float64(moved, guidance):
    """Flow-GRPO's step written out: b^2 / (2 c^2) times the mean square velocity difference."""
    policy, base = moved(guidance)
    schedule, table = table_of(policy)
    start, noise = noises(policy)
    found = transition_kl(policy, lambda: contextlib.nullcontext(base), table, TEXTS, start, noise)
    sigmas = schedule.sigmas.double().tolist()
    x, total = start, torch.zeros(2, dtype=torch.float64)
    for step in range(STEPS):
        s, s_next = sigmas[step], sigmas[step + 1]
        dt = s_next - s
        std = ETA * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        with torch.no_grad():
            told = schedule.timesteps[step].expand(2)
            v, v_base = (
                sampler.velocity(x, told, TEXTS).guided.double() for sampler in (policy, base)
            )
        b = (1 + std**2 * (1 - s) / (2 * s)) * dt
        c = std * math.sqrt(-dt)
        if s_next > 0:  # the last step is not trained
            total += b**2 / (2 * c**2) * (v - v_base).square().mean((1, 2, 3))
        mean = (1 + std**2 * dt / (2 * s)) * x.double() + b * v
        x = (mean + c * noise[step].double()).float()
    # float32 trajectories: a relative error of 1e-5 per step
    torch.testing.assert_close(found.double(), total / (STEPS - 1), rtol=1e-3, atol=0)
    assert (found > 0).all()


def test_equals_what_training_penalises(moved):
    """The KL that `grpo_loss` reports, of each step of the same trajectory."""
    policy, base = moved(1.0)
    schedule, table = table_of(policy)
    start, noise = noises(policy)
    found = transition_kl(policy, lambda: contextlib.nullcontext(base), table, TEXTS, start, noise)
    x, expected = start, []
    for step in range(STEPS):
        with torch.no_grad():
            told = schedule.timesteps[step].expand(2)
            v, v_base = (sampler.velocity(x, told, TEXTS).cond for sampler in (policy, base))
        coef = table.coefficients[step]
        out = gk.sde_step(v, x, coef, noise=noise[step])
        if step in table.trainable:
            loss = gk.grpo_loss(
                v,
                x,
                out.prev_sample,
                out.log_prob,
                torch.zeros(2),
                coef,
                gate=torch.ones(2, dtype=torch.bool),
                ref_velocity=v_base,
                kl_coef=1.0,
            )
            expected.append(float(loss.kl))
        x = out.prev_sample
    assert float(found.mean()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["flow", "cps", "dance"])
def test_a_policy_against_itself_is_exactly_zero(moved, kind):
    policy, _ = moved(2.0)
    _, table = table_of(policy, kind)
    start, noise = noises(policy)
    found = transition_kl(
        policy, lambda: contextlib.nullcontext(policy), table, TEXTS, start, noise
    )
    assert torch.equal(found, torch.zeros(2))


def test_padding_and_company_change_nothing(moved):
    """A draw alone, filled up to a batch of three, has the KL that it has beside others."""
    policy, base = moved(1.0)
    _, table = table_of(policy)
    painter = Painter(policy, [Prompt(text) for text in TEXTS], [3, 4])

    def kl(*draws):
        return painter.kl(lambda: contextlib.nullcontext(base), table, draws)

    together = kl(Draw(0, 0), Draw(1, 1), Draw(1, 0))
    assert torch.equal(kl(Draw(1, 1))[0], together[1])
    start, noise = noises(policy)
    expected = transition_kl(
        policy, lambda: contextlib.nullcontext(base), table, TEXTS, start, noise
    )
    # batches of two and three round differently
    torch.testing.assert_close(together[:2], expected, rtol=1e-3, atol=0)
