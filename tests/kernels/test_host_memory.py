"""Large CPU results take the memory of results that are gone, and of no others."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch

import gardo_kernels as gk
from gardo_kernels import core, host_memory

FLOATS = host_memory.MIN_BYTES // 4
SHAPE = (2, FLOATS // 2)


@pytest.fixture(autouse=True)
def nothing_waits():
    gc.collect()
    gk.empty_cache()
    yield
    gk.empty_cache()


def make(shape=SHAPE, dtype=torch.float32):
    return host_memory.empty(shape, dtype)


def waiting():
    return len(host_memory._waiting)


def test_shape_dtype_and_layout():
    for shape, dtype in [
        (SHAPE, torch.float32),
        ((3, FLOATS, 2), torch.bfloat16),
        ((0, 4), torch.half),
    ]:
        tensor = make(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_memory_of_a_result_that_is_gone_is_taken_again():
    first = make()
    address = first.data_ptr()
    del first
    assert make((FLOATS,)).data_ptr() == address
    # the same number of bytes in another dtype
    assert make((2, FLOATS), torch.float16).data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t.view(-1)[5:],
        lambda t: t.detach(),
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: torch.utils.dlpack.to_dlpack(t),
        lambda t: torch.nn.Parameter(t),
    ],
    ids=["view", "detach", "storage", "numpy", "dlpack", "parameter"],
)
def test_memory_is_not_taken_while_anything_uses_it(hold):
    result = make()
    address = result.data_ptr()
    held = hold(result)
    del result
    other = make()
    assert other.data_ptr() != address
    del held
    assert make().data_ptr() == address


def test_a_graph_that_saved_the_result_uses_it():
    weight = torch.ones(SHAPE, requires_grad=True)
    result = make().fill_(3.0)
    loss = (weight * result).sum()
    del result
    make().fill_(float("nan"))
    loss.backward()
    assert torch.equal(weight.grad, torch.full(SHAPE, 3.0))


def test_small_results_are_the_c_librarys():
    make((FLOATS - 1,))
    assert waiting() == 0


def test_no_more_than_four_blocks_of_one_size_wait():
    results = [make() for _ in range(7)]
    del results
    assert waiting() == host_memory.MAX_BLOCKS
    larger = make((3, FLOATS))
    assert waiting() == 0
    del larger
    assert waiting() == 1
    gk.empty_cache()
    assert waiting() == 0


def test_whatever_the_default_device_is():
    torch.set_default_device("meta")
    try:
        assert make().device.type == "cpu"
        assert make((3,)).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_threads_do_not_share_results():
    wrong = []

    def work(number):
        for _ in range(100):
            mine = make().fill_(number)
            again = make().fill_(-number)
            if not bool((mine == number).all()) or not bool((again == -number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert waiting() <= host_memory.MAX_BLOCKS


@pytest.mark.skipif(not core.is_available(), reason=str(core.unavailable_reason()))
def test_results_of_calls_that_are_alive_are_apart():
    g = torch.Generator().manual_seed(0)
    shape = (2, FLOATS)
    velocity, sample, ref = (torch.randn(shape, generator=g) for _ in range(3))
    velocity.requires_grad_()
    coef = gk.sde_coefficients(0.6, 0.5)

    def gradient(backend):
        step = gk.sde_step(velocity.detach(), sample, coef, seed=1, backend=backend)
        loss = gk.grpo_loss(
            velocity, sample, step.prev_sample, step.log_prob, torch.tensor([1.0, -1.0]), coef,
            ref_velocity=ref, kl_coef=0.1, backend=backend,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, velocity)[0]

    first = gradient("native")
    copy = first.clone()
    second = gradient("native")
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)
    assert torch.equal(first, second)
    expected = gradient("reference")
    assert float((first - expected).abs().max() / expected.abs().max()) < 4e-6


def test_results_that_outlive_the_interpreter_are_no_trouble():
    code = (
        "import torch; from gardo_kernels import host_memory as m\n"
        "held = [m.empty((1 << 20,), torch.float32).fill_(1) for _ in range(3)]\n"
        "torch.kept = held[0]; held[1] = None\n"
        "cycle = [held[2]]; cycle.append(cycle)\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "done", "")
