"""Ops over latents: the guided SDE step and the losses, forward and backward."""

from __future__ import annotations

import pytest
import torch

import gardo_kernels as gk

from . import eager
from .conftest import DEVICE

SIZES = {
    "SD3.5 512 B9": (9, 16, 64, 64),
    "SD3.5 1024 B9": (9, 16, 128, 128),
    "SD3.5 512 B64": (64, 16, 64, 64),
    "SD3.5 1024 B64": (64, 16, 128, 128),
    "Flux 1024 B9": (9, 4096, 64),
    "Flux 1024 B64": (64, 4096, 64),
}
if DEVICE == "cuda":
    SIZES["256 MiB"] = (64, 16, 256, 256)
# The forms of a size one after the other: what else the machine does changes from minute to minute.
VARIANTS = [(size, how) for size in SIZES for how in ("eager", "compiled", "ours")]
GUIDANCE = 4.5  # classifier-free for SD3.5; FLUX.1-dev has it in its weights
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}  # eager guidance rounds to the dtype


class Problem:
    """Inputs of one size, and the bytes that its ops cannot avoid."""

    def __init__(
        self, shape: tuple[int, ...], guided: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=g).to(device)

        rows = shape[0]
        self.v, self.old_v, self.ref = (normal(*shape).to(dtype) for _ in range(3))
        self.u = normal(*shape).to(dtype) if guided else None
        self.guidance = {"velocity_uncond": self.u, "guidance_scale": GUIDANCE if guided else 1.0}
        self.x, self.z = normal(*shape), normal(*shape)
        self.s, self.s_next = 0.6, 0.5
        self.column = torch.full((rows, *([1] * (len(shape) - 1))), 0.6, device=device)
        self.column_next = torch.full_like(self.column, 0.5)
        self.coef = gk.sde_coefficients(0.6, 0.5).to(device)
        self.advantage = normal(rows)
        self.gate = torch.arange(rows, device=device) % 2 == 0
        self.t = torch.linspace(0.1, 0.9, rows, device=device)
        self.velocity_bytes = self.v.numel() * self.v.element_size()
        self.latent_bytes = self.x.numel() * 4
        step = gk.sde_step(self.v, self.x, self.coef, noise=self.z, **self.guidance)
        self.prev = step.prev_sample
        self.old = step.log_prob + 1e-5 * normal(rows)


@pytest.fixture(scope="module")
def problems(velocity_dtype, device):
    made = {}

    def get(size: str) -> Problem:
        if size not in made:
            made.clear()
            made[size] = Problem(SIZES[size], "Flux" not in size, velocity_dtype, device)
        return made[size]

    return get


def assert_close(actual, expected, dtype):
    for a, b in zip(actual, expected, strict=True):
        a, b = a.detach().float(), b.detach().float()
        error = float((a - b).abs().max() / b.abs().max())
        assert error < TOLERANCE[dtype], error


def form(how, function):
    return torch.compile(function) if how == "compiled" else function


@pytest.mark.parametrize(("size", "how"), VARIANTS)
def test_sde_step(measure, problems, size, how):
    p = problems(size)
    seed = torch.tensor([1], device=p.v.device)

    def ours(z):
        noise = {"seed": seed} if z is None else {"noise": z}
        return gk.sde_step(p.v, p.x, p.coef, **p.guidance, **noise)

    def theirs(z):
        return eager.sde_step(p.v, p.u, p.x, z, GUIDANCE, p.column, p.column_next)

    run = ours if how == "ours" else form(how, theirs)
    with torch.no_grad():
        assert_close(run(p.z), theirs(p.z), p.v.dtype)
        least = (2 if p.u is not None else 1) * p.velocity_bytes + 3 * p.latent_bytes
        measure(lambda: run(None), f"sde_step, {size}", how, least)


@pytest.mark.parametrize(("size", "how"), VARIANTS)
def test_sde_log_prob_forward_backward(measure, problems, size, how):
    p = problems(size)
    velocities = [x.clone().requires_grad_() for x in (p.v, p.u) if x is not None]

    def ours(v, u=None):
        guidance = p.guidance | {"velocity_uncond": u}
        return gk.sde_log_prob(v, p.x, p.prev, p.coef, **guidance)

    def theirs(v, u=None):
        return eager.sde_log_prob(v, u, p.x, p.prev, GUIDANCE, p.column, p.column_next)

    log_prob = ours if how == "ours" else form(how, theirs)

    def run():
        value = log_prob(*velocities)
        return value, *torch.autograd.grad(value, velocities, p.advantage)

    value = theirs(*velocities)
    expected = (value, *torch.autograd.grad(value, velocities, p.advantage))
    assert_close(run(), expected, p.v.dtype)
    own = len(velocities) * p.velocity_bytes
    measure(run, f"sde_log_prob fwd+bwd, {size}", how, 3 * own + 4 * p.latent_bytes)


@pytest.mark.parametrize(("size", "how"), VARIANTS)
def test_grpo_loss_forward_backward(measure, problems, size, how):
    p = problems(size)
    velocities = [x.clone().requires_grad_() for x in (p.v, p.u) if x is not None]

    def ours(v, u=None):
        return gk.grpo_loss(
            v, p.x, p.prev, p.old, p.advantage, p.coef, gate=p.gate, ref_velocity=p.ref,
            kl_coef=0.04, velocity_uncond=u, guidance_scale=p.guidance["guidance_scale"],
        ).loss  # fmt: skip

    def theirs(v, u=None):
        return eager.grpo_loss(
            v, u, p.x, p.prev, p.old, p.advantage, p.gate, p.ref, GUIDANCE, p.column, p.column_next
        )

    loss = ours if how == "ours" else form(how, theirs)

    def run():
        value = loss(*velocities)
        return value, *torch.autograd.grad(value, velocities)

    value = theirs(*velocities)
    assert_close(run(), (value, *torch.autograd.grad(value, velocities)), p.v.dtype)
    own = len(velocities) * p.velocity_bytes
    half = p.velocity_bytes / 2  # the reference on gated rows only
    forward = own + 2 * p.latent_bytes + half
    measure(run, f"grpo_loss fwd+bwd, {size}", how, int(2 * forward + own))


@pytest.mark.parametrize(("size", "how"), VARIANTS)
def test_nft_loss_forward_backward(measure, problems, size, how):
    p = problems(size)
    v = p.v.clone().requires_grad_()

    def ours(v):
        return gk.nft_loss(
            v, p.old_v, p.x, p.prev, p.t, p.advantage, ref_velocity=p.ref, kl_coef=0.04
        ).loss

    def theirs(v):
        return eager.nft_loss(v, p.old_v, p.x, p.prev, p.t, p.advantage, p.ref)

    loss = ours if how == "ours" else form(how, theirs)

    def run():
        value = loss(v)
        return value, *torch.autograd.grad(value, v)

    value = theirs(v)
    assert_close(run(), (value, *torch.autograd.grad(value, v)), p.v.dtype)
    forward = 3 * p.velocity_bytes + 2 * p.latent_bytes
    measure(run, f"nft_loss fwd+bwd, {size}", how, 2 * forward + p.velocity_bytes)
