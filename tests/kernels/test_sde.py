"""Coefficients, the step and its log-probability against hand-written formulas."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gardo_kernels as gk

KINDS = ("flow", "cps", "dance")
SHAPES = [(3, 1), (1, 7), (2, 16, 4, 4), (2, 3, 2, 3, 5), (2, 6, 4), (4,)]


def expected_mean_and_std(kind, x, v, s, s_next, eta, s_max=0.9):
    """The variants as their papers write them, in numpy float64."""
    dt = s_next - s
    x0, x1 = x - s * v, x + (1 - s) * v
    if kind == "flow":
        std = eta * np.sqrt(s / (1 - (s_max if s == 1 else s)))
        drift = v + std**2 / (2 * s) * (x + (1 - s) * v)
        return x + drift * dt, std * np.sqrt(-dt), std
    if kind == "cps":
        std = s_next * np.sin(eta * np.pi / 2)
        return (1 - s_next) * x0 + np.sqrt(s_next**2 - std**2) * x1, std, std
    std = eta * np.sqrt(-dt)
    score = -(x - (1 - s) * x0) / s**2
    return x + dt * v - 0.5 * eta**2 * dt * score, std, std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.9), (0.6, 0.45), (0.05, 0.01)])
def test_coefficients_are_the_papers_formulas(kind, s, s_next):
    coef = gk.sde_coefficients(s, s_next, 0.7, kind, sigma_max=0.9, dtype=torch.float64)
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    mean, c, std = expected_mean_and_std(kind, x, v, s, s_next, 0.7)
    step = gk.sde_step(torch.tensor(v), torch.tensor(x), coef, noise=torch.ones(2, 8))
    np.testing.assert_allclose(step.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(step.prev_sample.numpy(), mean + c, rtol=1e-12)
    np.testing.assert_allclose(float(coef.std), std, rtol=1e-14)
    np.testing.assert_allclose(float(coef.kl), float(coef.b) ** 2 / (2 * c**2), rtol=1e-12)
    if kind == "cps":
        expected = -np.full(2, c**2)
    else:
        expected = np.full(2, -0.5 - np.log(c) - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(step.log_prob.numpy(), expected, rtol=1e-10)


def test_known_numbers():
    # sigma 0.5 -> 0.4, eta 0.8: std 0.8, c^2 = 0.064, a = 1 - 0.064, b = -0.1 * 1.32.
    coef = gk.sde_coefficients(0.5, 0.4, 0.8, dtype=torch.float64)
    assert float(coef.a) == pytest.approx(0.936, rel=1e-12)
    assert float(coef.b) == pytest.approx(-0.132, rel=1e-12)
    assert float(coef.c) == pytest.approx(math.sqrt(0.064), rel=1e-12)
    assert float(coef.scale) == pytest.approx(7.8125, rel=1e-12)
    official = gk.sde_coefficients(0.5, 0.4, 0.8, kl_scale="official", dtype=torch.float64)
    assert float(official.kl) == pytest.approx(0.132**2 / (2 * 0.64), rel=1e-12)


def test_ode_is_the_euler_step_without_density(rng):
    coef = gk.sde_coefficients(0.5, 0.4, kind="ode")
    x, v = torch.randn(2, 5, generator=rng), torch.randn(2, 5, generator=rng)
    step = gk.sde_step(v, x, coef)
    torch.testing.assert_close(step.prev_sample, x - 0.1 * v, rtol=1e-6, atol=1e-7)
    assert step.log_prob.isnan().all()
    with pytest.raises(ValueError, match="coef: expected a stochastic kind"):
        gk.sde_log_prob(v, x, step.prev_sample, coef)


def test_without_noise_level_the_flow_step_is_the_ode_step():
    still = gk.sde_coefficients(0.5, 0.4, 0.0)
    ode = gk.sde_coefficients(0.5, 0.4, kind="ode")
    assert [float(still.a), float(still.b), float(still.c)] == [1.0, float(ode.b), 0.0]


def test_coefficients_round_once_from_float64():
    sigmas = torch.linspace(1, 0, 11)
    table = gk.sde_coefficients(sigmas[:-1], sigmas[1:], sigma_max=sigmas[1])
    wide = gk.sde_coefficients(
        sigmas[:-1], sigmas[1:], sigma_max=sigmas[1], dtype=torch.float64
    ).tensors()
    for name, value in table.tensors().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wide[name].float()), name


def test_table_indexing_gives_steps_and_rows():
    sigmas = torch.linspace(0.9, 0, 7)
    table = gk.sde_coefficients(sigmas[:-1], sigmas[1:])
    assert len(table) == 6
    assert table[2].shape == torch.Size([])
    rows = table[torch.tensor([0, 5, 5])]
    assert rows.shape == torch.Size([3])
    assert torch.equal(rows.a, table.a[[0, 5, 5]])
    assert table[2].expand(4).c.tolist() == [float(table.c[2])] * 4
    with pytest.raises(IndexError):
        table[2][0]


def test_rows_with_their_own_step_equal_single_steps(rng):
    sigmas = torch.linspace(0.9, 0.1, 5)
    table = gk.sde_coefficients(sigmas[:-1], sigmas[1:])
    x, v = torch.randn(4, 3, 3, generator=rng), torch.randn(4, 3, 3, generator=rng)
    noise = torch.randn(4, 3, 3, generator=rng)
    together = gk.sde_step(v, x, table, noise=noise)
    for i in range(4):
        alone = gk.sde_step(v[i : i + 1], x[i : i + 1], table[i], noise=noise[i : i + 1])
        assert torch.equal(alone.prev_sample[0], together.prev_sample[i])
        assert torch.equal(alone.log_prob[0], together.log_prob[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_sample_gives_the_same_bits(kind, dtype, shape, rng):
    coef = gk.sde_coefficients(0.6, 0.5, kind=kind)
    v = torch.randn(shape, generator=rng).to(dtype)
    u = torch.randn(shape, generator=rng).to(dtype)
    x = torch.randn(shape, generator=rng)
    step = gk.sde_step(v, x, coef, seed=7, velocity_uncond=u, guidance_scale=4.5)
    assert step.prev_sample.dtype == step.log_prob.dtype == torch.float32
    again = gk.sde_log_prob(v, x, step.prev_sample, coef, velocity_uncond=u, guidance_scale=4.5)
    assert torch.equal(again, step.log_prob)


@pytest.mark.parametrize("n", [1, 5, 1000, 4096, 65536])
def test_log_prob_of_a_row_ignores_batch_size_and_threads(n, rng):
    coef = gk.sde_coefficients(0.6, 0.5)
    v, x, p = (torch.randn(9, n, generator=rng) for _ in range(3))
    together = gk.sde_log_prob(v, x, p, coef)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 2, 4):
                parts = [
                    gk.sde_log_prob(v[i : i + size], x[i : i + size], p[i : i + size], coef)
                    for i in range(0, 9, size)
                ]
                assert torch.equal(torch.cat(parts), together)
    finally:
        torch.set_num_threads(threads)


def test_strided_inputs_give_the_same_bits(rng):
    coef = gk.sde_coefficients(0.6, 0.5)
    v, x, z = (torch.randn(3, 4, 6, generator=rng) for _ in range(3))
    plain = gk.sde_step(v, x, coef, noise=z)
    strided = gk.sde_step(
        v.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x], -1)[..., 0],
        coef,
        noise=z[:, :1].expand(3, 4, 6).clone().copy_(z),
    )
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    coef = gk.sde_coefficients(0.6, 0.5)
    empty = torch.empty(0, 4, 4)
    step = gk.sde_step(empty, empty, coef, seed=1)
    assert step.prev_sample.shape == (0, 4, 4)
    assert step.log_prob.shape == (0,)
    assert gk.sde_log_prob(empty, empty, empty, coef).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_gradient(kind, rng):
    coef = gk.sde_coefficients(0.6, 0.5, kind=kind, dtype=torch.float64)
    v, u, x, p = (
        torch.randn(2, 3, 2, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(4)
    )
    assert torch.autograd.gradcheck(
        lambda v, u: gk.sde_log_prob(v, x, p, coef, u, 3.0, backend="reference"), (v, u)
    )
    gk.sde_log_prob(v, x, p, coef, u, 3.0).sum().backward()
    assert x.grad is None
    assert p.grad is None


def test_seed_makes_noise_that_is_normal_and_reproducible():
    coef = gk.sde_coefficients(0.6, 0.5)
    zero = torch.zeros(4, 50_001)
    first = gk.sde_step(zero, zero, coef, seed=3)
    again = gk.sde_step(zero, zero, coef, seed=torch.tensor([3]))
    other = gk.sde_step(zero, zero, coef, seed=4)
    assert torch.equal(first.prev_sample, again.prev_sample)
    z, w = first.prev_sample / coef.c, other.prev_sample / coef.c
    # 200,004 draws: mean within 5 standard errors, variance and kurtosis likewise.
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))
    assert float((z**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / z.numel()))
    for a, b in ((z, w), (z[0], z[1]), (z[:, :-1], z[:, 1:])):  # seeds, rows, neighbours
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_noise_of_a_row_does_not_depend_on_the_batch():
    coef = gk.sde_coefficients(0.6, 0.5)
    big, small = torch.zeros(5, 3, 3), torch.zeros(2, 3, 3)
    assert torch.equal(
        gk.sde_step(big, big, coef, seed=11).prev_sample[:2],
        gk.sde_step(small, small, coef, seed=11).prev_sample,
    )


def test_philox_known_answers():
    # Known-answer vectors of Random123 (kat_vectors, philox4x32-10).
    from gardo_kernels.ops.sde.philox import _philox4x32

    ones = 0xFFFFFFFF
    cases = [
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (-1, [ones] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0_A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for seed, counter, expected in cases:
        words = _philox4x32(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))
        assert [int(w) for w in words] == expected


def test_default_generator_makes_unseeded_steps_reproducible():
    coef = gk.sde_coefficients(0.6, 0.5)
    x = torch.zeros(2, 8)
    torch.manual_seed(5)
    first = gk.sde_step(x, x, coef).prev_sample
    second = gk.sde_step(x, x, coef).prev_sample
    torch.manual_seed(5)
    assert torch.equal(gk.sde_step(x, x, coef).prev_sample, first)
    assert not torch.equal(first, second)


def test_numpy_numbers_are_numbers():
    coef = gk.sde_coefficients(np.float32(0.5), np.float64(0.25), np.float32(0.5))
    assert float(coef.b) == float(gk.sde_coefficients(0.5, 0.25, 0.5).b)
    x = torch.zeros(1, 4)
    assert torch.equal(
        gk.sde_step(x, x, coef, seed=np.int64(3)).prev_sample,
        gk.sde_step(x, x, coef, seed=3).prev_sample,
    )


def test_concurrent_calls_from_threads(rng):
    coef = gk.sde_coefficients(0.6, 0.5)
    ids = torch.arange(96) % 4

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        x, rewards = torch.randn(3, 5000, generator=g), torch.randn(3, 96, generator=g)
        v = x.clone().requires_grad_()
        step = gk.sde_step(x, x, coef, seed=seed)
        out = gk.grpo_loss(v, x, step.prev_sample, step.log_prob, rewards[0, :3], coef)
        (grad,) = torch.autograd.grad(out.loss, v)
        shaped = gk.shape_rewards(rewards[0], rewards[1:], ids)
        distance = gk.nearest_neighbor_distance(rewards.T.contiguous(), ids)
        return (*step, out.loss.detach(), grad, *shaped, distance)

    serial = [work(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for alone, together in zip(serial, pool.map(work, range(12)), strict=True):
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b)


X = torch.zeros(2, 3)
COEF = gk.sde_coefficients(0.6, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.sde_coefficients(1.0, 0.9), ValueError, "sigma_max: expected the second"),
        (lambda: gk.sde_coefficients(1.0, 0.9, sigma_max=1.0), ValueError, "sigma_max"),
        (lambda: gk.sde_coefficients(0.5, 0.6), ValueError, "sigma_next: expected values in"),
        (lambda: gk.sde_coefficients(1.5, 0.6), ValueError, "sigma: expected values in"),
        (lambda: gk.sde_coefficients("a", 0.6), TypeError, "sigma: expected a number, got str"),
        (lambda: gk.sde_coefficients(torch.ones(2, 2), 0.6), ValueError, r"got \[2, 2\]"),
        (
            lambda: gk.sde_coefficients(torch.full((2,), 0.5), torch.zeros(3)),
            ValueError,
            r"sigma_next: expected shape \[2\], got \[3\]",
        ),
        (lambda: gk.sde_coefficients(0.5, 0.4, kind="euler"), ValueError, "kind: .*'euler'"),
        (lambda: gk.sde_coefficients(0.5, 0.4, -1.0), ValueError, "noise_level"),
        (lambda: gk.sde_coefficients(0.5, 0.4, 1.1, "cps"), ValueError, "noise_level"),
        (lambda: gk.sde_coefficients(0.5, 0.4, kl_scale="x"), ValueError, "kl_scale"),
        (lambda: gk.sde_step(X.long(), X, COEF), TypeError, "velocity: expected dtype"),
        (lambda: gk.sde_step([1.0], X, COEF), TypeError, "velocity: expected a torch.Tensor"),
        (lambda: gk.sde_step(X, X[:1], COEF), ValueError, r"sample: expected shape \[2, 3\]"),
        (lambda: gk.sde_step(torch.tensor(1.0), X, COEF), ValueError, "velocity: expected shape"),
        (lambda: gk.sde_step(X[:, :0], X[:, :0], COEF), ValueError, "at least one element"),
        (lambda: gk.sde_step(X, X, 3), TypeError, "coef: expected SDECoefficients, got int"),
        (lambda: gk.sde_step(X, X, COEF.expand(3)), ValueError, r"coef: .*\[2\], got \[3\]"),
        (lambda: gk.sde_step(X, X, COEF, noise=X, seed=1), ValueError, "seed: expected None"),
        (lambda: gk.sde_step(X, X, COEF, noise=X[:, :2]), ValueError, "noise: expected shape"),
        (lambda: gk.sde_step(X, X, COEF, seed=1.5), TypeError, "seed: expected an int"),
        (lambda: gk.sde_step(X, X, COEF, seed=2**63), ValueError, "seed: expected a 64-bit"),
        (lambda: gk.sde_step(X, X, COEF, seed=torch.zeros(2).long()), ValueError, "seed"),
        (lambda: gk.sde_step(X, X, COEF, seed=torch.zeros(1)), TypeError, "seed: .*int64"),
        (lambda: gk.sde_step(X, X, COEF, guidance_scale=4.5), ValueError, "velocity_uncond"),
        (
            lambda: gk.sde_step(X, X, COEF, velocity_uncond=X, guidance_scale="x"),
            TypeError,
            "guidance_scale",
        ),
        (lambda: gk.sde_step(X, X, COEF, backend="cuda"), ValueError, "backend: expected one of"),
        (lambda: gk.sde_step(X, X.to("meta"), COEF), ValueError, "sample: expected device cpu"),
        (lambda: gk.sde_log_prob(X, X, X[:1], COEF), ValueError, "prev_sample: expected shape"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
