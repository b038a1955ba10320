"""The CUDA advantages, gates, win rates and caps against the reference.

Without a GPU their logic is tested by running the kernels on a CPU: `make asan`
(csrc/tests/cuda_emulation.cpp).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import gardo_kernels as gk
from gardo_kernels import core

NORMS = ("none", "group_std", "global_std")
GATES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not core.has_cuda():
        pytest.skip(f"native CUDA: {core.cuda_unavailable_reason()}")
    return torch.device("cuda", torch.cuda.current_device())


def case(samples: int, num_aux: int, device: torch.device) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(samples)
    rewards = (torch.randn(num_aux + 1, samples, generator=rng).double() * 50).round()
    rewards[torch.rand(rewards.shape, generator=rng) < 0.02] = torch.nan
    ids = torch.randint(-20, 20, (samples,), generator=rng) * (1 << 40)
    distance = torch.rand(samples, generator=rng).double()
    moved = (rewards[0], rewards[1:], ids, distance)
    return tuple(value.to(device).contiguous() for value in moved)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [0, 1, 33, 1152, 4096, 4097, 9216, 1_000_000])
@pytest.mark.parametrize("num_aux", [0, 2, 17])
def test_matches_the_reference(cuda: torch.device, samples: int, num_aux: int) -> None:
    proxy, aux, ids, distance = case(samples, num_aux, cuda)
    combinations = list(itertools.product(NORMS, GATES, SCOPES))
    for norm, gate, scope in combinations if samples < 10_000 else combinations[:3]:
        arguments = (proxy, aux, ids, distance, 0.1, norm, gate, scope)
        got = gk.shape_rewards(*arguments, backend="native")
        again = gk.shape_rewards(*arguments, backend="native")
        want = gk.shape_rewards(*arguments, backend="reference")
        for value, repeated, expected in zip(got, again, want, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
            assert torch.equal(value, repeated)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [0, 1, 33, 1152, 4096, 4097, 9216])
@pytest.mark.parametrize("num_aux", [0, 2, 17])
def test_every_gate_matches_the_reference(cuda: torch.device, samples: int, num_aux: int) -> None:
    proxy, aux, ids, distance = case(samples, num_aux, cuda)
    choices = (("over", "under"), ("half", "ordinal", "strict"), ("all", "nonnegative"), SCOPES)
    for options in itertools.product(*choices):
        got = gk.gate_samples(proxy, aux, ids, 0.1, *options, backend="native")
        want = gk.gate_samples(proxy, aux, ids, 0.1, *options, backend="reference")
        for value, expected in zip(got, want, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    for norm, scale in itertools.product(NORMS, ("group_mean", "raw")):
        rewards = (proxy, ids, distance, norm, scale)
        value = gk.group_advantages(*rewards, backend="native")
        expected = gk.group_advantages(*rewards, backend="reference")
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1, 33, 4096, 4097, 9216])
@pytest.mark.parametrize("grouped", [False, True])
def test_win_rate_matches_the_reference(cuda: torch.device, samples: int, grouped: bool) -> None:
    _, rewards, ids, _ = case(samples, 3, cuda)
    got = gk.win_rate(rewards, ids if grouped else None, backend="native")
    want = gk.win_rate(rewards, ids if grouped else None, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [0, 1, 33, 9216])
@pytest.mark.parametrize("size", [1, 3, 1152])
def test_caps_match_the_reference(cuda: torch.device, samples: int, size: int) -> None:
    proxy, aux, _, _ = case(samples, 2, cuda)
    pool_proxy, pool_aux, _, _ = case(size, 2, cuda)
    pool = torch.cat([pool_proxy[None], pool_aux])
    for tau in (-0.2, 0.0, 0.3, torch.tensor(0.3, device=cuda)):
        got = gk.cap_rewards(proxy, aux, pool, tau, backend="native")
        want = gk.cap_rewards(proxy, aux, pool, tau, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.gpu
def test_caps_are_captured_in_a_graph(cuda: torch.device) -> None:
    proxy, aux, _, _ = case(1152, 2, cuda)
    anchor = gk.Anchor(torch.randn(3, 300, device=cuda).double())
    percentile = torch.tensor(95.0, device=cuda)

    def judged() -> tuple[Tensor, ...]:
        share = percentile / 100
        return (
            anchor.cap(proxy, aux, percentile),
            anchor.uncertainty(proxy, aux),
            anchor.threshold(share),
        )

    judged()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        judged()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = judged()
    proxy.copy_(proxy.roll(1))
    percentile.fill_(50.0)
    graph.replay()
    for value, expected in zip(captured, judged(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1152, 9216])
def test_captured_in_a_graph(cuda: torch.device, samples: int) -> None:
    proxy, aux, ids, distance = case(samples, 2, cuda)
    fraction = torch.tensor(0.1, dtype=torch.float64, device=cuda)
    gk.shape_rewards(proxy, aux, ids, distance, fraction)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gk.shape_rewards(proxy, aux, ids, distance, fraction)
    proxy.copy_(proxy.roll(1))
    fraction.fill_(0.2)
    graph.replay()
    want = gk.shape_rewards(proxy, aux, ids, distance, 0.2)
    for value, expected in zip(captured, want, strict=True):
        assert torch.equal(value, expected)


def test_other_devices_are_refused() -> None:
    if not core.is_available():
        pytest.skip(f"C++ core: {core.unavailable_reason()}")
    with pytest.raises(ValueError, match="proxy: expected a CPU or CUDA tensor, got device meta"):
        core.require_device("proxy", torch.zeros(4, device="meta"))
