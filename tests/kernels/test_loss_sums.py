"""Losses as sums, whose weights are the caller's, and GRPO-Guard's ratio from the noise."""

from __future__ import annotations

import pytest
import torch
from fused_inputs import (
    BACKENDS,
    CASES,
    GRAD_TOLERANCE,
    close,
    coefficients,
    device_of,
    grpo_inputs,
    inputs,
    wide,
)

import gardo_kernels as gk

ALL_BACKENDS = ["reference", *BACKENDS]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("gated", ["none", "some", "all"])
def test_grpo_sums_are_the_means_times_their_counts(backend, guard, gated):
    v, u, ref, x, prev, old, advantage, gate, coef = grpo_inputs((6, 300), torch.float32, backend)
    gate = {"none": gate & ~gate, "some": gate, "all": None}[gated]
    count = 6 if gate is None else max(int(gate.sum()), 1)
    results = []
    for reduction in ("mean", "sum"):
        a, b = v.clone().requires_grad_(), u.clone().requires_grad_()
        out = gk.grpo_loss(
            a, x, prev, old, advantage, coef, clip_range=0.01, gate=gate, ref_velocity=ref,
            kl_coef=0.3, velocity_uncond=b, guidance_scale=3.0, backend=backend,
            reduction=reduction, noise=x if guard else None,
        )  # fmt: skip
        results.append((out, out.policy_loss, out.kl, out.loss))
    (mean, *_), (total, policy_loss, kl, loss) = results
    close(policy_loss, mean.policy_loss * 6, 1e-6)
    close(kl, mean.kl * count, 1e-6)
    close(loss, policy_loss + 0.3 * kl, 1e-6)
    for name in ("log_prob", "ratio", "clip_fraction"):
        assert torch.equal(getattr(mean, name), getattr(total, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("guard", [False, True])
def test_grpo_sum_and_its_gradient(backend, shape, dtype, guard):
    v, u, ref, x, prev, old, advantage, gate, coef = grpo_inputs(shape, dtype, backend)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(v.device)
    results = []
    for name, cast in ((backend, lambda t: t), ("reference", wide)):
        a, b = cast(v).clone().requires_grad_(), cast(u).clone().requires_grad_()
        out = gk.grpo_loss(
            a, cast(x), cast(prev), cast(old), cast(advantage), coef, clip_range=(0.003, 0.005),
            gate=gate, ref_velocity=cast(ref), kl_coef=0.3, velocity_uncond=b, guidance_scale=3.0,
            backend=name, reduction="sum", noise=cast(noise) if guard else None,
        )  # fmt: skip
        (out.loss * 1000).backward()
        results.append((out, a.grad, b.grad))
    (out, *grads), (expected, *expected_grads) = results
    terms = float((advantage.abs() * expected.ratio.abs()).sum()) if shape[0] else 0.0
    close(out.ratio, expected.ratio, 2e-5)
    close(out.loss, expected.loss, 2e-5, max(terms, 1.0))
    close(out.kl, expected.kl, 1e-5)
    for actual, value in zip(grads, expected_grads, strict=True):
        assert actual.dtype == dtype
        close(actual, value, max(3e-5, GRAD_TOLERANCE[dtype]))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("kind", ["flow", "cps", "dance"])
def test_guard_is_its_formula(backend, kind):
    """As GRPO-Guard writes it: the noise times the shift of the mean, clipped as in PPO."""
    v, u, _, x, z = inputs((4, 3, 50), torch.float32, backend)
    coef = coefficients(kind, 4, backend)
    step = gk.sde_step(v, x, coef, noise=z, backend=backend)
    advantage = torch.tensor([1.0, -2.0, 7.0, 0.5], device=v.device)
    moved = (v + 0.01 * u).requires_grad_()
    out = gk.grpo_loss(
        moved, x, step.prev_sample, step.log_prob, advantage, coef, clip_range=2e-4, noise=z,
        reduction="sum", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, moved)

    w = moved.detach().double().requires_grad_()
    a, b, c = (f.double().view(-1, 1, 1) for f in (coef.a, coef.b, coef.c))
    old_mean = step.prev_sample.double() - c * z.double()
    shift = a * x.double() + b * w - old_mean
    ratio = torch.exp((z.double() * shift).flatten(1).mean(1))
    limited = advantage.double().clamp(-5, 5)
    policy = torch.maximum(-limited * ratio, -limited * ratio.clamp(1 - 2e-4, 1 + 2e-4)).sum()
    close(out.ratio, ratio, 1e-6)
    close(out.policy_loss, policy, 1e-6, 10.0)
    close(gradient, torch.autograd.grad(policy, w)[0], 1e-5)
    # On policy it is 1 up to the rounding of the stored sample.
    same = gk.grpo_loss(
        v, x, step.prev_sample, step.log_prob, advantage, coef, noise=z, backend=backend
    )
    assert float((same.ratio - 1).abs().max()) < 1e-6


def test_gradcheck_of_the_sum_with_noise():
    g = torch.Generator().manual_seed(0)
    v, u, x, prev, z, ref = (torch.randn(3, 5, generator=g).double() for _ in range(6))
    coef = gk.sde_coefficients(0.6, 0.5, dtype=torch.float64)
    advantage, gate = torch.tensor([1.0, -1.0, 0.3]).double(), torch.tensor([True, False, True])
    old = gk.sde_log_prob(v, x, prev, coef)

    def loss(v, u, noise):
        return gk.grpo_loss(
            v, x, prev, old, advantage, coef, clip_range=(0.99, 9.0), gate=gate, ref_velocity=ref,
            kl_coef=0.2, velocity_uncond=u, guidance_scale=2.0, reduction="sum", noise=noise,
        ).loss  # fmt: skip

    for noise in (None, z):
        inputs = (v.clone().requires_grad_(), u.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b, n=noise: loss(a, b, n), inputs)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("gated", ["none", "some", "all"])
def test_nft_sums_are_the_means_times_their_counts(backend, gated):
    v, old, ref, x0, xt = inputs((5, 70), torch.float32, backend)
    t, advantage = (torch.linspace(*s, 5, device=v.device) for s in ((0.1, 0.9), (-6, 6)))
    gate = {"none": [0] * 5, "some": [1, 0, 1, 1, 0], "all": [1] * 5}[gated]
    gate = torch.tensor(gate, dtype=torch.bool, device=v.device)
    results = []
    for reduction in ("mean", "sum"):
        a = v.clone().requires_grad_()
        out = gk.nft_loss(
            a, old, x0, xt, t, advantage, 0.5, 5.0, gate, ref, 0.3, backend=backend,
            reduction=reduction,
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.loss, a)))
    (mean, by_mean), (total, by_sum) = results
    count = max(int(gate.sum()), 1)
    close(total.policy_loss, mean.policy_loss * 5, 1e-6)
    close(total.kl, mean.kl * count, 1e-6)
    close(total.loss, total.policy_loss + 0.3 * total.kl, 1e-6)
    if count == 5:
        close(by_sum, by_mean * 5, 1e-6)
    w = v.double().requires_grad_()
    want = gk.nft_loss(
        w, wide(old), wide(x0), wide(xt), t, advantage, 0.5, 5.0, gate, wide(ref), 0.3,
        reduction="sum",
    ).loss  # fmt: skip
    close(by_sum, torch.autograd.grad(want, w)[0], 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "batch"}, ValueError, "reduction: expected one of mean, sum, got 'batch'"),
        ({"reduction": "sum", "kl_reduction": "gated"}, ValueError, "kl_reduction: expected None"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise: expected shape \[2, 3\], got \[2, 4\]"),
        ({"noise": torch.zeros(2, 3).long()}, TypeError, "noise: expected dtype"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x, rows = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(error, match=message):
        gk.grpo_loss(x, x, x, rows, rows, gk.sde_coefficients(0.6, 0.5), **change)


def test_nft_errors_name_the_argument():
    x, rows = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, got 'none'"):
        gk.nft_loss(x, x, x, x, rows, rows, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_compile_without_graph_breaks(backend):
    device = device_of(backend)
    v, _, ref, x, prev, old, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, backend)

    def gradient(v):
        a = gk.grpo_loss(v, x, prev, old, advantage, coef, gate=gate, ref_velocity=ref,
                         kl_coef=0.1, backend=backend, reduction="sum", noise=x)  # fmt: skip
        b = gk.nft_loss(v, ref, x, prev, torch.full((4,), 0.3, device=device), advantage,
                        backend=backend, reduction="sum")  # fmt: skip
        return a.loss + b.loss

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    found = []
    for function in (gradient, compiled):
        w = v.clone().requires_grad_()
        loss = function(w)
        loss.backward()
        found.append((loss.detach(), w.grad))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
