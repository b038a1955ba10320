"""What PyTorch expects of an operator: registrations, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from fused_inputs import (
    BACKENDS,
    RUNS_TRITON,
    device_of,
    grpo_inputs,
)

import gardo_kernels as gk


def op_samples(backend):
    """Arguments of every operator, as the public functions pass them."""
    v, u, ref, x, prev, old, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, backend)
    device = v.device
    a, b = v.clone().requires_grad_(), u.clone().requires_grad_()
    seed = torch.tensor([3], device=device)
    alpha = torch.ones(4, device=device)
    t = torch.rand(4, device=device)
    ids = torch.tensor([0, 0, 1, 1], device=device)
    table, upstream, one = coef.operands(), alpha[0], torch.ones(3, 4, device=device)
    samples = {
        "sde_step": (v, x, table, None, seed, u, 3.0),
        "sde_log_prob": (a, x, prev, table, b, 3.0),
        "velocity_grad": (v, x, prev, table, upstream, alpha, alpha, ref, u, 3.0),
        "grpo_loss": (a, x, prev, old, advantage, table, 0.1, 0.1, 5.0, gate, ref, 0.1, "gated",
                      None, b, 3.0),
        "nft_loss": (a, u, x, prev, t, advantage, 0.5, 5.0, gate, ref, 0.1, "mean"),
        "nft_grad": (v, u, x, prev, t, upstream, one, 0.5, ref),
        "nearest_neighbor_distance": (v, ids),
    }  # fmt: skip
    return {name: (backend, *operands) for name, operands in samples.items()}


OPS = [
    "sde_step", "sde_log_prob", "velocity_grad", "grpo_loss", "nft_loss", "nft_grad",
    "nearest_neighbor_distance",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend, name):
    torch.library.opcheck(getattr(torch.ops.gardo, name).default, op_samples(backend)[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    v, u, ref, x, _, _, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, backend)

    def train(v, u):
        step = gk.sde_step(
            v, x, coef, seed=3, velocity_uncond=u, guidance_scale=3.0, backend=backend
        )
        grpo = gk.grpo_loss(
            v, x, step.prev_sample, step.log_prob, advantage, coef, gate=gate, ref_velocity=ref,
            kl_coef=0.1, velocity_uncond=u, guidance_scale=3.0, backend=backend,
        )  # fmt: skip
        nft = gk.nft_loss(v, u, x, step.prev_sample, advantage.abs() / 100, advantage,
                          gate=gate, ref_velocity=ref, kl_coef=0.1, backend=backend)  # fmt: skip
        lp = gk.sde_log_prob(v, x, step.prev_sample, coef, u, 3.0, backend=backend)
        return grpo.loss + nft.loss + lp.sum(), grpo.ratio

    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    results = []
    for function in (train, compiled):
        a, b = v.clone().requires_grad_(), u.clone().requires_grad_()
        loss, ratio = function(a, b)
        loss.backward()
        assert (ratio == 1).all()
        results.append((loss.detach(), a.grad, b.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", BACKENDS[0]])
def test_shaping_is_an_operator(backend):
    g = torch.Generator().manual_seed(0)
    proxy, aux, features = (torch.randn(*s, generator=g) for s in ((12,), (2, 12), (12, 5)))
    ids = torch.arange(12) % 3
    ops, wide = torch.ops.gardo, (proxy.double(), aux.double())
    gate = (*wide, ids, 0.1, None, "over", "half", "all", "group")
    torch.library.opcheck(ops.gate_samples.default, (backend, *gate))
    advantages = (wide[0], ids, None, "none", "group_mean")
    torch.library.opcheck(ops.group_advantages.default, (backend, *advantages))
    torch.library.opcheck(ops.nearest_neighbor_distance.default, (backend, features, ids))

    def shape(proxy, features):
        distance = gk.nearest_neighbor_distance(features, ids, backend=backend)
        return gk.shape_rewards(proxy, aux, ids, distance, backend=backend), gk.win_rate(aux, ids)

    torch._dynamo.reset()
    compiled = torch.compile(shape, fullgraph=True, backend="aot_eager")
    (traced, wins), (eager, expected) = compiled(proxy, features), shape(proxy, features)
    torch.testing.assert_close(wins, expected)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_compiles_without_graph_breaks():
    v, _, ref, x, prev, old, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, "native")

    def loss(v):
        return gk.grpo_loss(
            v, x, prev, old, advantage, coef, gate=gate, ref_velocity=ref, kl_coef=0.1,
            backend="reference",
        ).loss  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v), loss(v))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rollouts_and_references_made_in_inference_mode(backend):
    device = device_of(backend)
    with torch.inference_mode():
        coef = gk.sde_coefficients(0.6, 0.5).to(device)
        x, u, ref = (torch.randn(3, 5, device=device) for _ in range(3))
        gate = torch.ones(3, dtype=torch.bool, device=device)
        advantage = torch.linspace(0.1, 1, 3, device=device)
        step = gk.sde_step(x, x, coef, seed=1, backend=backend)
    v = torch.randn(3, 5, device=device, requires_grad=True)
    options = {"gate": gate, "ref_velocity": ref, "kl_coef": 0.1, "backend": backend}
    grpo = gk.grpo_loss(
        v, x, step.prev_sample, step.log_prob, advantage, coef, velocity_uncond=u,
        guidance_scale=2.0, **options,
    )  # fmt: skip
    nft = gk.nft_loss(v, u, x, step.prev_sample, advantage, advantage, **options)
    lp = gk.sde_log_prob(v, x, step.prev_sample, coef, backend=backend)
    (grpo.loss + nft.loss + lp.sum()).backward()
    assert v.grad.isfinite().all()
    assert (v.grad != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_inputs_are_refused_not_rounded(backend):
    x = torch.zeros(2, 3, dtype=torch.float64, device=device_of(backend))
    coef = gk.sde_coefficients(0.6, 0.5).to(x.device)
    with pytest.raises(gk.BackendUnavailable, match="got float64 inputs"):
        gk.sde_step(x, x, coef, seed=1, backend=backend)
    assert gk.sde_step(x, x, coef, seed=1).mean.dtype == torch.float64


@pytest.mark.skipif(RUNS_TRITON, reason="this process runs Triton itself")
def test_triton_is_refused_with_the_reason():
    x, coef = torch.zeros(2, 3), gk.sde_coefficients(0.6, 0.5)
    with pytest.raises(gk.BackendUnavailable, match="TRITON_INTERPRET=1"):
        gk.sde_step(x, x, coef, seed=1, backend="triton")
