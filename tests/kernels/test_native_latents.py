"""The C++ kernels on latents against the float64 reference, and their contracts on bits."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from gardo_kernels import SDEStep, core, sde_coefficients
from gardo_kernels.ops.grpo_loss import native as grpo_native
from gardo_kernels.ops.grpo_loss import reference as grpo_reference
from gardo_kernels.ops.nft_loss import native as nft_native
from gardo_kernels.ops.nft_loss import reference as nft_reference
from gardo_kernels.ops.sde import SDECoefficients, native, philox_normal
from gardo_kernels.ops.sde import reference as sde_reference

pytestmark = pytest.mark.skipif(
    not core.is_available(), reason=f"C++ core: {core.unavailable_reason()}"
)

# Odd sizes, one element, an empty batch, video [B, C, F, H, W], packed Flux [B, L, C]; more than
# one block of 1024 with a remainder.
SHAPES = [(3, 4, 8, 8), (1, 1), (2, 7), (0, 4, 8, 8), (2, 3, 2, 5, 7), (2, 33, 64), (3, 2051)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["flow", "cps", "dance"]
# The core computes in float32 whatever the dtype of the velocity is: one tolerance for values.
# Gradients are rounded to the dtype of the velocity, to half a unit in its last place.
VALUE = {"rtol": 2e-5, "atol": 2e-6}
GRADIENT_RTOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def coefficients(rows: int, kind: str = "flow", per_row: bool = True) -> SDECoefficients:
    if not per_row:
        return sde_coefficients(0.8, 0.7, 0.7, kind)
    sigma = torch.linspace(0.9, 0.5, max(rows, 1), dtype=torch.float64)[:rows]
    return sde_coefficients(sigma, sigma - 0.1, 0.7, kind)


def latents(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype)


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: SDECoefficients | list[Tensor],
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> SDEStep:
    table = coef.operands() if isinstance(coef, SDECoefficients) else coef
    return SDEStep(
        *native.sde_step(velocity, sample, table, noise, seed, velocity_uncond, guidance_scale)
    )


def velocity_grad(
    velocity: Tensor,
    sample: Tensor,
    prev: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor | None = None,
    ref: Tensor | None = None,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    coef = [a, b, a, a, a, a]  # the others are not read
    grad = torch.ones(()) if grad is None else grad
    return native.velocity_grad(velocity, sample, prev, coef, grad, alpha, beta, ref, uncond, scale)


def assert_gradient(got: Tensor, want: Tensor) -> None:
    """Relative to the largest entry: single entries are differences of nearly equal numbers."""
    scale = want.abs().max().item() if want.numel() else 0.0
    rtol = GRADIENT_RTOL[got.dtype]
    # float16 has a smallest step of 2^-24, and half of it is the error of rounding to it.
    floor = 2.0**-25 if got.dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rtol, atol=rtol * scale * 0.1 + floor
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_step_and_log_prob_match_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, guided: bool
) -> None:
    for kind, per_row in itertools.product(KINDS, [True, False]):
        coef = coefficients(shape[0], kind, per_row)
        velocity, sample, noise = latents(shape, 1, dtype), latents(shape, 2), latents(shape, 3)
        uncond, scale = (latents(shape, 4, dtype), 4.5) if guided else (None, 1.0)
        got = sde_step(
            velocity, sample, coef, noise=noise, velocity_uncond=uncond,
            guidance_scale=scale,
        )  # fmt: skip
        prev, log_prob, mean = sde_reference.sde_step(
            velocity, sample, coef, noise, uncond, scale, torch.float64
        )
        torch.testing.assert_close(got.mean.double(), mean, **VALUE)
        torch.testing.assert_close(got.prev_sample.double(), prev, **VALUE)
        torch.testing.assert_close(got.log_prob.double(), log_prob, **VALUE)
        again = native.sde_log_prob(
            velocity, sample, got.prev_sample, coef.operands(), uncond, scale
        )
        assert torch.equal(again, got.log_prob)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 7), (5, 2051), (1, 1), (0, 3)], ids=str)
def test_noise_is_the_documented_stream(shape: tuple[int, ...]) -> None:
    # Box-Muller in float32 here and there: the angle alone is off by up to 5e-7 turns.
    ones = torch.ones(())
    zeros = torch.zeros(())
    seed = torch.tensor([-(2**62) + 12345])
    got = sde_step(
        torch.zeros(shape), torch.zeros(shape), [zeros, zeros, ones, ones, zeros, ones],
        seed=seed,
    )  # fmt: skip
    torch.testing.assert_close(
        got.prev_sample, philox_normal(seed, torch.Size(shape)), rtol=0, atol=1e-5
    )


def test_noise_is_standard_normal() -> None:
    zeros, ones = torch.zeros(()), torch.ones(())
    shape = (4, 250_000)
    z = sde_step(
        torch.zeros(shape), torch.zeros(shape), [zeros, zeros, ones, ones, zeros, ones],
        seed=torch.tensor(7),
    ).prev_sample.double()  # fmt: skip
    # Standard errors for 10^6 draws: 0.001 (mean), 0.0014 (variance), 0.005 (kurtosis); 5 of each.
    assert abs(z.mean().item()) < 0.005
    assert abs(z.var().item() - 1) < 0.007
    assert abs((z**4).mean().item() - 3) < 0.05
    assert abs((z[:, 1:] * z[:, :-1]).mean().item()) < 0.005
    # Kolmogorov-Smirnov distance to the normal distribution, 1% point 1.63/sqrt(n).
    ordered = z.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    empirical = (torch.arange(len(ordered), dtype=torch.float64) + 0.5) / len(ordered)
    assert (cdf - empirical).abs().max().item() < 1.63 / math.sqrt(len(ordered))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_on_policy_ratio_is_exactly_one(dtype: torch.dtype, kind: str, guided: bool) -> None:
    shape = (5, 4, 17, 19)
    coef = coefficients(5, kind)
    velocity, sample = latents(shape, 1, dtype), latents(shape, 2)
    uncond, scale = (latents(shape, 4, dtype), 4.5) if guided else (None, 1.0)
    step = sde_step(
        velocity, sample, coef, seed=torch.tensor([3]), velocity_uncond=uncond,
        guidance_scale=scale,
    )  # fmt: skip
    # Training takes the rows in another order and in other batches.
    for rows in ([0, 1, 2, 3, 4], [3], [4, 1]):
        _, stats, _, ratio, _, _ = grpo_native.grpo_loss(
            velocity[rows], sample[rows], step.prev_sample[rows], step.log_prob[rows],
            torch.ones(len(rows)), coef[torch.tensor(rows)].operands(), 1e-5, 1e-5, 5.0, None,
            None, 0.0, "gated", None, None if uncond is None else uncond[rows], scale,
        )  # fmt: skip
        assert torch.equal(ratio, torch.ones(len(rows)))
        assert stats[2].item() == 0


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    shape = (6, 5000)
    coef = coefficients(6)
    velocity, sample = latents(shape, 1), latents(shape, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sde_step(velocity, sample, coef, seed=torch.tensor([1])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for value, want in zip(other, results[0], strict=True):
            assert torch.equal(value, want)
    # Noise belongs to the row's index, so the first rows of a smaller batch are the same.
    part = sde_step(velocity[:2], sample[:2], coef[torch.arange(2)], seed=torch.tensor([1]))
    assert torch.equal(part.log_prob, results[0].log_prob[:2])
    assert torch.equal(part.prev_sample, results[0].prev_sample[:2])


def test_concurrent_calls_agree() -> None:
    shape = (4, 60_000)
    coef = coefficients(4)
    velocity, sample = latents(shape, 1), latents(shape, 2)

    def step(seed: int) -> SDEStep:
        return sde_step(velocity, sample, coef, seed=torch.tensor([seed]))

    expected = [step(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for seed, got in enumerate(pool.map(step, [0, 1, 2] * 3)):
            for value, want in zip(got, expected[seed % 3], strict=True):
                assert torch.equal(value, want)


def test_without_noise_the_step_is_the_mean() -> None:
    coef = sde_coefficients(0.8, 0.7, kind="ode")
    velocity, sample = latents((2, 5), 1), latents((2, 5), 2)
    got = sde_step(velocity, sample, coef)
    assert torch.equal(got.prev_sample, got.mean)
    torch.testing.assert_close(got.mean, sample - 0.1 * velocity)
    assert got.log_prob.isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grpo_loss_and_gradient_match_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows = shape[0]
    for kind, guided, reduction, gated in itertools.product(
        ["flow", "cps"], [False, True], ["gated", "batch", "sum"], ["none", "half", "all", "no_kl"]
    ):
        coef = coefficients(rows, kind)
        velocity, sample, ref = latents(shape, 1, dtype), latents(shape, 2), latents(shape, 5)
        uncond, scale = (latents(shape, 4, dtype), 3.0) if guided else (None, 1.0)
        gate = {"none": torch.zeros(rows), "half": torch.arange(rows) % 2}.get(gated)
        gate = None if gate is None else gate.bool()
        used_ref = None if gated == "no_kl" else ref.clone()
        if used_ref is not None and gate is not None:
            used_ref[~gate] = torch.nan  # must not be read
        step = sde_step(
            velocity, sample, coef, seed=torch.tensor([9]), velocity_uncond=uncond,
            guidance_scale=scale,
        )  # fmt: skip
        # Ratios on both sides of the clip range and inside it.
        old = step.log_prob - torch.linspace(-0.02, 0.02, max(rows, 1))[:rows]
        advantage = torch.tensor([2.0, -7.0, 0.5])[:rows]
        loss, stats, log_prob, ratio, alpha, beta = grpo_native.grpo_loss(
            velocity, sample, step.prev_sample, old, advantage, coef.operands(), 1e-2, 1e-2, 5.0,
            gate, used_ref, 0.3, reduction, None, uncond, scale,
        )  # fmt: skip
        v = velocity.double().requires_grad_()
        u = None if uncond is None else uncond.double().requires_grad_()
        want = grpo_reference.grpo_loss(
            v, sample, step.prev_sample, old, advantage, coef, 1e-2, 1e-2, 5.0, gate, used_ref,
            0.3, reduction, None, u, scale, torch.float64,
        )  # fmt: skip
        policy_loss, kl, clip_fraction = stats
        found = (loss, policy_loss, kl, log_prob, ratio, clip_fraction)
        for actual, value in zip(found, want, strict=True):
            torch.testing.assert_close(actual.double(), value.detach(), **VALUE)
        grad, grad_uncond = velocity_grad(
            velocity, sample, step.prev_sample, coef.a, coef.b, alpha,
            None if used_ref is None else beta, used_ref, uncond, scale,
        )  # fmt: skip
        want[0].backward()
        assert grad.dtype == dtype
        assert_gradient(grad, v.grad)
        if u is not None:
            assert grad_uncond.dtype == dtype
            assert_gradient(grad_uncond, u.grad)


def test_grpo_gradient_at_the_edges_of_the_ratio() -> None:
    # One row each: inside, above and below the clip range with either sign of the advantage, an
    # overflowing ratio without advantage, and a NaN log-prob.
    shift = torch.tensor([0.0, 1.0, 1.0, -1.0, -1.0, 200.0, math.nan])
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 1.0])
    # The gradient is lost exactly where clipping makes the loss larger.
    alive = [True, False, True, True, False, False, True]
    coef = coefficients(7)
    velocity, sample = latents((7, 9), 1), latents((7, 9), 2)
    step = sde_step(velocity, sample, coef, seed=torch.tensor([9]))
    _, _, _, ratio, alpha, beta = grpo_native.grpo_loss(
        velocity, sample, step.prev_sample, step.log_prob - shift, advantage, coef.operands(),
        0.1, 0.1, 5.0, None, None, 0.0, "gated", None, None, 1.0,
    )  # fmt: skip
    assert (alpha != 0).tolist() == alive
    assert alpha.isnan().tolist() == [False] * 6 + [True]
    assert ratio[5].isinf()
    assert (beta == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nft_loss_and_gradient_match_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows = shape[0]
    for beta, per_row, gated, reduction in itertools.product(
        [1.0, 0.1], [True, False], ["none", "half", "all", "no_kl"], ["mean", "sum"]
    ):
        velocity, old, ref = (latents(shape, seed, dtype) for seed in (1, 2, 3))
        x0, xt = latents(shape, 4), latents(shape, 5)
        t = torch.linspace(0.2, 0.9, max(rows, 1))[:rows] if per_row else torch.tensor(0.4)
        advantage = torch.tensor([2.0, -7.0, 0.5])[:rows]
        gate = {"none": torch.zeros(rows), "half": torch.arange(rows) % 2}.get(gated)
        gate = None if gate is None else gate.bool()
        used_ref = None if gated == "no_kl" else ref
        loss, stats, weights = nft_native.nft_loss(
            velocity, old, x0, xt, t, advantage, beta, 5.0, gate, used_ref, 0.3, reduction
        )
        v = velocity.double().requires_grad_()
        want = nft_reference.nft_loss(
            v, old, x0, xt, t, advantage, beta, 5.0, gate, used_ref, 0.3, reduction, torch.float64
        )
        for value, expected in zip((loss, *stats), want, strict=True):
            torch.testing.assert_close(value.double(), expected.detach(), **VALUE)
        grad = nft_native.nft_grad(
            velocity, old, x0, xt, t, torch.ones(()), weights, beta, used_ref
        )
        want[0].backward()
        assert grad.dtype == dtype
        assert_gradient(grad, v.grad)


def test_every_float16_and_bfloat16_is_read_and_written_exactly() -> None:
    # alpha = -1/b and sample = prev = 0, a = 1 give grad = -alpha * b * v = v: read, then written.
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
        v = patterns.view(dtype).reshape(1, -1)
        zero, one = torch.zeros_like(v), torch.ones(())
        grad, _ = velocity_grad(v, zero, zero, one, one, -torch.ones(1))
        finite = v.isfinite()
        assert torch.equal(grad[finite], v[finite])
        assert torch.equal(grad[~finite].isnan(), v[~finite].isnan())
        assert torch.equal(grad[v.isinf()], v[v.isinf()])


def test_float32_is_rounded_to_half_as_torch_does() -> None:
    # All exponents, with mantissas around the ties of either dtype.
    ends = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    high = torch.arange(0, 2**15, 7).repeat_interleave(len(ends))
    low = torch.tensor(ends).repeat(high.numel() // len(ends))
    wide = ((high << 16) | low).to(torch.int32).view(torch.float32)
    extra = torch.tensor([65519.9, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 1e-30])
    wide = torch.cat([wide, extra, -extra]).reshape(1, -1)
    one, zero = torch.ones(()), torch.zeros(())
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.zeros(wide.shape, dtype=dtype)
        # grad = alpha * (prev - 0) with alpha = 1
        grad, _ = velocity_grad(v, v, wide, zero, zero, one.reshape(1))
        want = wide.to(dtype)
        same = (grad == want) | (grad.isnan() & want.isnan())
        assert same.all(), (wide[~same][:5], grad[~same][:5], want[~same][:5])


def test_bfloat16_is_read_alike_in_the_loops_and_converted() -> None:
    # All velocities bfloat16: converted within the loops. One of them float32: block by block.
    shape = (3, 2051)
    v, u, ref = (latents(shape, seed, torch.bfloat16) for seed in (1, 2, 3))
    x, prev = latents(shape, 4), latents(shape, 5)
    one, rows = torch.ones(()), torch.ones(3)

    def results(ref: Tensor, u: Tensor) -> list[Tensor]:
        coef = [one, -0.1 * one, one, one, one, one]
        loss = grpo_native.grpo_loss(
            v, x, prev, rows, rows, coef, 0.1, 0.1, 5.0, None, ref, 0.1, "gated", None, u, 4.5
        )
        nft = (v, u, x, prev, 0.5 * one)
        weights = torch.stack([rows, -rows, 0.1 * rows])
        return [
            *loss,
            *sde_step(v, x, coef, None, torch.tensor([1]), u, 4.5),
            *velocity_grad(v, x, prev, one, -0.1 * one, rows, 0.1 * rows, ref, u, 4.5),
            *nft_native.nft_loss(*nft, rows, 1.0, 5.0, None, ref, 0.1, "mean"),
            nft_native.nft_grad(*nft, one, weights, 1.0, ref),
        ]

    expected = results(ref, u)
    for got in (results(ref.float(), u), results(ref, u.float())):
        for value, want in zip(got, expected, strict=True):
            assert torch.equal(value.to(want.dtype), want)


def test_the_incoming_gradient_multiplies_the_weights() -> None:
    v, x, prev = (latents((3, 100), seed) for seed in (1, 2, 3))
    a, alpha, beta = torch.ones(()), torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.1, 0.0, 0.2])
    for grad in (torch.tensor(0.3), torch.tensor([0.3, -2.0, 7.0]), torch.tensor(0.3).expand(3)):
        got, _ = velocity_grad(v, x, prev, a, a, alpha, beta, x, grad=grad)
        want, _ = velocity_grad(v, x, prev, a, a, alpha * grad, beta * grad, x)
        assert torch.equal(got, want)


def test_wrong_inputs_are_refused() -> None:
    v = latents((2, 6), 1)
    coef = coefficients(2)
    with pytest.raises(TypeError, match=r"velocity: expected float32, float16 or bfloat16"):
        sde_step(v.double(), v, coef)
    with pytest.raises(ValueError, match=r"sample: expected shape \[2, 6\], got \[2, 5\]"):
        sde_step(v, v[:, :5], coef)
    with pytest.raises(ValueError, match=r"noise: expected a CPU tensor, got device meta"):
        sde_step(v, v, coef, noise=v.to("meta"))
    with pytest.raises(ValueError, match=r"a: expected shape \[\] or \[2\], got \[3\]"):
        sde_step(v, v, coefficients(3))
    with pytest.raises(ValueError, match=r"sample: expected a contiguous tensor"):
        core.latents("sample", latents((6, 2), 1).t(), v)
    with pytest.raises(ValueError, match=r"gate: expected a contiguous tensor"):
        core.array("gate", torch.zeros(4)[::2], torch.float32, (2,))
    with pytest.raises(ValueError, match=r"ref_velocity: expected a tensor when beta is given"):
        velocity_grad(v, v, v, coef.a, coef.b, torch.ones(2), torch.ones(2))
