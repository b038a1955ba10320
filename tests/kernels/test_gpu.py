"""What only a GPU can show: CUDA graphs, streams and devices, no host synchronisation."""

from __future__ import annotations

import pytest
import torch

import gardo_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def latents():
    g = torch.Generator("cuda").manual_seed(0)
    return tuple(
        torch.randn(9, 16, 64, 64, generator=g, device="cuda", dtype=torch.bfloat16).to(dtype)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )


def test_graph_replay_draws_fresh_noise_and_equals_eager(latents):
    v, u, x = latents
    coef = gk.sde_coefficients(0.6, 0.5).to("cuda")
    seed = torch.tensor([1], device="cuda")

    def step():
        return gk.sde_step(v, x, coef, seed=seed, velocity_uncond=u, guidance_scale=4.5)

    step()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for value in (5, 6, 5):
        seed.fill_(value)
        graph.replay()
        seen.append(captured.prev_sample.clone())
        eager = step()
        assert torch.equal(eager.prev_sample, captured.prev_sample)
        assert torch.equal(eager.log_prob, captured.log_prob)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_losses_can_be_captured(latents):
    v, u, x = latents
    coef = gk.sde_coefficients(0.6, 0.5).to("cuda")
    step = gk.sde_step(v, x, coef, seed=1, velocity_uncond=u, guidance_scale=4.5)
    advantage = torch.linspace(-2, 2, 9, device="cuda")
    gate = torch.arange(9, device="cuda") % 2 == 0
    velocity = v.clone().requires_grad_()

    def gradient():
        out = gk.grpo_loss(
            velocity, x, step.prev_sample, step.log_prob, advantage, coef, gate=gate,
            ref_velocity=u, kl_coef=0.1, velocity_uncond=u, guidance_scale=4.5,
        )  # fmt: skip
        return (out.ratio, *torch.autograd.grad(out.loss, velocity))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ratio, grad = gradient()
    graph.replay()
    assert (ratio == 1).all()
    assert torch.equal(grad, expected[1])


def test_no_op_waits_for_the_device(latents):
    v, u, x = latents
    coef = gk.sde_coefficients(0.6, 0.5).to("cuda")
    seed = torch.tensor([1], device="cuda")
    row = torch.ones(9, device="cuda")
    ids = torch.arange(9, device="cuda") // 3
    features = torch.randn(9, 33, device="cuda")

    def everything():
        step = gk.sde_step(v, x, coef, seed=seed)
        velocity = v.clone().requires_grad_()
        out = gk.grpo_loss(
            velocity, x, step.prev_sample, step.log_prob, row, coef, ref_velocity=u, kl_coef=0.1
        )
        out.loss.backward()
        gk.nft_loss(v, u, x, step.prev_sample, row, row, ref_velocity=u, kl_coef=0.1)
        distance = gk.nearest_neighbor_distance(features, ids)
        gk.shape_rewards(row, features[:, :2].T, ids, distance, advantage_norm="global_std")
        gk.shape_rewards(row, features[:, :2].T, ids, gate="official", scope="group")
        gk.win_rate(features.T, ids)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shaping_on_the_device_equals_the_cpu():
    g = torch.Generator().manual_seed(0)
    proxy, aux = torch.randn(300, generator=g), torch.randn(2, 300, generator=g)
    ids = torch.randint(12, (300,), generator=g)
    distance = torch.rand(300, generator=g)
    for gate in ("paper", "official"):
        cpu = gk.shape_rewards(proxy, aux, ids, distance, gate=gate)
        gpu = gk.shape_rewards(proxy.cuda(), aux.cuda(), ids.cuda(), distance.cuda(), gate=gate)
        for a, b in zip(cpu, gpu, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-6)
