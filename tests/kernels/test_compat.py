"""The drop-ins behave as the functions they replace, written out here with plain torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gardo_kernels.compat.dance_grpo import flux_step
from gardo_kernels.compat.flow_grpo import PerPromptStatTracker, sde_step_with_logprob


class Scheduler:
    """The part of a flow-matching scheduler that the drop-in uses."""

    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])
    timesteps = sigmas[:-1] * 1000

    def index_for_timestep(self, timestep):
        return int((self.timesteps == timestep).nonzero()[0])


def transition(kind, x, v, s, s_next, eta):
    """Mean and noise scale in float64, from the papers."""
    if kind == "sde":
        std = (s / (1 - (0.9 if s == 1 else s))) ** 0.5 * eta
        dt = s_next - s
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        return mean, std * (-dt) ** 0.5, std
    std = s_next * math.sin(eta * math.pi / 2)
    x0, x1 = x - s * v, x + (1 - s) * v
    return x0 * (1 - s_next) + x1 * (s_next**2 - std**2) ** 0.5, std, std


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("steps", [[0, 0], [3, 1], [2]])
def test_flow_grpo_step(rng, kind, steps):
    scheduler = Scheduler()
    v = torch.randn(2, 4, 3, 3, generator=rng).requires_grad_()
    x = torch.randn(2, 4, 3, 3, generator=rng)
    prev = torch.randn(2, 4, 3, 3, generator=rng)
    timestep = scheduler.timesteps[steps]
    out = sde_step_with_logprob(
        scheduler, v, timestep, x, 0.8, prev, sde_type=kind, return_sqrt_dt=True
    )
    assert len(out) == 5
    stored, log_prob, mean, std, sqrt_dt = out
    assert torch.equal(stored, prev)
    assert std.shape == sqrt_dt.shape == (len(steps), 1, 1, 1)
    w = v.detach().double().requires_grad_()
    for row in range(2):
        i = steps[row % len(steps)]
        s, s_next = (float(t) for t in scheduler.sigmas[i : i + 2])
        wide, c, wide_std = transition(kind, x[row].double(), w[row], s, s_next, 0.8)
        square = (prev[row] - wide) ** 2
        if kind == "sde":
            wide_log = -square / (2 * c**2) - math.log(c) - math.log(math.sqrt(2 * math.pi))
        else:
            wide_log = -square
        torch.testing.assert_close(mean[row], wide.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(log_prob[row], wide_log.mean().float(), rtol=2e-5, atol=1e-6)
        assert float(std[row % len(steps)]) == pytest.approx(wide_std, rel=1e-6)
        assert float(sqrt_dt[row % len(steps)]) == pytest.approx((s - s_next) ** 0.5, rel=1e-6)
        (wide_log.mean() + wide.sum()).backward()
    (log_prob.sum() + mean.sum()).backward()
    torch.testing.assert_close(v.grad, w.grad.float(), rtol=1e-4, atol=1e-6)


def test_flow_grpo_sampling_uses_the_generator():
    scheduler = Scheduler()
    v, x = torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.float16)
    out = sde_step_with_logprob(scheduler, v, 750.0, x, generator=torch.Generator().manual_seed(1))
    assert len(out) == 4
    prev, log_prob, mean, std = out
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    sqrt_dt = (0.75 - 0.5) ** 0.5
    torch.testing.assert_close(prev, mean + std.view(1, 1) * sqrt_dt * noise)
    assert prev.dtype == log_prob.dtype == torch.float32
    for timestep in (torch.tensor(750.0), [750.0, 750.0], torch.tensor([750.0, 750.0])):
        again = sde_step_with_logprob(scheduler, v, timestep, x, prev_sample=prev)
        assert torch.equal(again[1], log_prob)
    each = [torch.Generator().manual_seed(s) for s in (5, 6)]
    rows = sde_step_with_logprob(scheduler, v, 750.0, x, generator=each)[0]
    alone = torch.randn(1, 3, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(rows[1:], mean[1:] + std.view(1, 1) * sqrt_dt * alone)


def test_flow_grpo_sampling_under_grad_is_differentiable():
    scheduler = Scheduler()
    v = torch.ones(2, 3, requires_grad=True)
    prev, log_prob, mean, _ = sde_step_with_logprob(scheduler, v, 750.0, torch.zeros(2, 3))
    assert not prev.requires_grad
    (log_prob.sum() + mean.sum()).backward()
    assert v.grad.abs().sum() > 0


def test_flow_grpo_with_the_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    v = torch.ones(1, 2)
    _, _, mean, std = sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[4].unsqueeze(0), torch.zeros(1, 2), prev_sample=v
    )
    s, s_next = (float(t) for t in scheduler.sigmas[4:6])
    wide, _, wide_std = transition("sde", torch.zeros(1, 2), v, s, s_next, 0.7)
    torch.testing.assert_close(mean, wide, rtol=1e-5, atol=1e-6)
    assert float(std) == pytest.approx(wide_std, rel=1e-5)


def test_flow_grpo_errors():
    scheduler, x = Scheduler(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="timestep: expected 1 or 3 values, got 2"):
        sde_step_with_logprob(scheduler, x, scheduler.timesteps[:2], x)
    with pytest.raises(ValueError, match="sde_type: expected one of sde, cps"):
        sde_step_with_logprob(scheduler, x, 750.0, x, sde_type="ode")
    with pytest.raises(ValueError, match="generator: expected 3 generators, got 1"):
        sde_step_with_logprob(scheduler, x, 750.0, x, generator=[torch.Generator()])


def test_tracker_against_the_recordings(golden):
    prompts = [f"prompt {i}" for i in golden["adv/group_ids"].tolist()]
    rewards = golden["adv/rewards"].numpy()
    for flag in (0, 1):
        tracker = PerPromptStatTracker(bool(flag))
        plain = tracker.update(prompts, rewards)
        np.testing.assert_allclose(plain, golden[f"adv/grpo_globalstd{flag}"], rtol=0, atol=1e-9)
        shaped = tracker.update(prompts, rewards, golden["adv/features"].numpy(), "gardo")
        # The recorded distances are float32.
        np.testing.assert_allclose(shaped, golden[f"adv/gardo_globalstd{flag}"], rtol=0, atol=3e-7)
        assert tracker.get_stats() == (8.0, 6)
        tracker.clear()
        assert tracker.get_stats() == (0, 6)


def test_tracker_columns_and_types():
    tracker = PerPromptStatTracker(False)
    prompts, rewards = ["b", "a", "b", "a"], np.array([1.0, 2.0, 3.0, 2.0])
    both = tracker.update(prompts, np.stack([rewards, 2 * rewards], axis=1))
    np.testing.assert_allclose(both[:, 0], [-1 / 1.0001, 0, 1 / 1.0001, 0])
    np.testing.assert_allclose(both[:, 1], [-2 / 2.0001, 0, 2 / 2.0001, 0])
    assert tracker.update(prompts, rewards, type="rwr").tolist() == rewards.tolist()
    assert tracker.update(prompts, rewards, type="sft").tolist() == [0, 1, 1, 1]
    assert tracker.update(prompts, rewards, type="dpo").tolist() == [-1, -1, 1, 1]
    with pytest.raises(ValueError, match="type: expected one of grpo"):
        tracker.update(prompts, rewards, type="ppo")
    with pytest.raises(ValueError, match=r"rewards: expected shape \[4\]"):
        tracker.update(prompts, rewards[:3])


@pytest.mark.parametrize("sde_solver", [False, True])
def test_dance_grpo_step(rng, sde_solver):
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.1])
    v = torch.randn(2, 6, 4, generator=rng).requires_grad_()
    x, prev = torch.randn(2, 6, 4, generator=rng), torch.randn(2, 6, 4, generator=rng)
    eta, s, s_next = 0.3, 0.8, 0.5
    w, y = v.detach().double(), x.double()
    original = y - s * w
    mean = y + (s_next - s) * w
    if sde_solver:
        mean = mean - 0.5 * eta**2 * (s_next - s) * -(y - (1 - s) * original) / s**2
    std = eta * math.sqrt(s - s_next)
    density = -((prev - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    out = flux_step(v, x, eta, sigmas, 1, prev, True, sde_solver)
    assert torch.equal(out[0], prev)
    torch.testing.assert_close(out[1], original.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[2], density.mean((1, 2)).float(), rtol=2e-5, atol=1e-5)
    out[2].sum().backward()
    assert v.grad.isfinite().all()
    still, start = flux_step(v, x, eta, sigmas, 1, None, False, sde_solver)
    torch.testing.assert_close(still, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(start, original.float(), rtol=1e-5, atol=1e-6)
    drawn = flux_step(v, x, eta, sigmas, 1, None, True, sde_solver)
    z = (drawn[0] - mean.float()) / std
    assert 0.4 < float(z.std()) < 1.6
    assert torch.equal(flux_step(v, x, eta, sigmas, 1, drawn[0], True, sde_solver)[2], drawn[2])


def test_dance_grpo_errors():
    x, sigmas = torch.zeros(1, 2), torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"index: expected a step in \[0, 1\], got 2"):
        flux_step(x, x, 0.3, sigmas, 2, None, True, True)
    with pytest.raises(TypeError, match="index: expected an int"):
        flux_step(x, x, 0.3, sigmas, 0.5, None, True, True)
