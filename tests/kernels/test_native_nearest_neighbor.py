"""The C++ nearest-neighbour distance against the float64 reference and hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.ops.nearest_neighbor import native, reference

pytestmark = pytest.mark.skipif(
    not core.is_available(), reason=f"C++ core: {core.unavailable_reason()}"
)

# The neighbour is found in float32, its distance is half a squared difference of unit rows.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def features(samples: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    length = 10 ** torch.empty(samples, 1).uniform_(-3, 3, generator=rng)
    return (length * torch.randn(samples, dim, generator=rng)).to(dtype)


def group_ids(samples: int, groups: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-groups, groups, (samples,), generator=rng) * (1 << 33)


@pytest.mark.parametrize(
    ("samples", "dim", "groups"),
    [(96, 32, 2), (50, 1024, 3), (37, 7, 5), (9, 1, 1), (1, 5, 1), (0, 5, 1), (64, 1500, 64),
     (700, 33, 1), (900, 16, 2)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference(samples: int, dim: int, groups: int, dtype: torch.dtype) -> None:
    x, ids = features(samples, dim, 1, dtype), group_ids(samples, groups, 2)
    got = native.nearest_neighbor_distance(x, ids)
    want = reference.nearest_neighbor_distance(x.double(), ids)
    torch.testing.assert_close(got.double(), want, **TOLERANCE)


def test_hand_computed() -> None:
    root = math.sqrt(0.5)
    x = torch.tensor(
        [[2.0, 0.0], [0.0, 3.0], [5.0, 5.0], [-1.0, 0.0], [0.0, 0.0], [4.0, 0.0], [7.0, 7.0]]
    )
    ids = torch.tensor([5, 5, 5, 9, 9, -2, 5])
    got = native.nearest_neighbor_distance(x, ids)
    # Rows 2 and 6 point the same way; rows 0 and 1 are 45 degrees from them; a zero row is at
    # distance 1; row 5 is alone.
    assert got.tolist() == pytest.approx([1 - root, 1 - root, 0, 1, 1, 0, 0], abs=1e-7)


def test_duplicates_are_at_distance_zero_exactly() -> None:
    base = features(3, 257, seed=3)
    x = base[torch.tensor([0, 1, 2, 0, 1, 2])]
    assert native.nearest_neighbor_distance(x, torch.zeros(6, dtype=torch.int64)).eq(0).all()


def test_near_duplicates_keep_relative_accuracy() -> None:
    # 1 - cos(angle) = angle^2 / 2 = 5e-9 here, far below the resolution of a float32 cosine.
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-4]])
    got = native.nearest_neighbor_distance(x, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(got, torch.full((2,), 5e-9), rtol=1e-4, atol=0)


def test_rows_that_are_not_finite_are_no_ones_neighbour() -> None:
    x = features(40, 24, seed=4)
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    ids = group_ids(40, 2, seed=5)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 17]] = False
    got = native.nearest_neighbor_distance(x, ids)
    assert got[~keep].isnan().all()
    alone = native.nearest_neighbor_distance(x[keep], ids[keep])
    assert torch.equal(got[keep], alone)
    # Nobody usable left: as a singleton.
    pair = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    got = native.nearest_neighbor_distance(pair, torch.zeros(2, dtype=torch.int64))
    assert got[0] == 0
    assert got[1].isnan()


def test_lengths_near_the_ends_of_float32() -> None:
    x = torch.tensor([[3e38, 0.0], [3e38, 3e38], [1e-38, 1e-38]])
    got = native.nearest_neighbor_distance(x, torch.zeros(3, dtype=torch.int64))
    assert got.tolist() == pytest.approx([1 - math.sqrt(0.5), 0, 0], abs=1e-6)


def test_bits_do_not_depend_on_threads_or_order() -> None:
    x, ids = features(800, 40, 6), group_ids(800, 4, 7)
    ids[:500] = 1  # one large group among small ones
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.nearest_neighbor_distance(x, ids)
        torch.set_num_threads(3)
        three = native.nearest_neighbor_distance(x, ids)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(8))
    permuted = native.nearest_neighbor_distance(x[order], ids[order])
    torch.testing.assert_close(permuted, one[order], **TOLERANCE)


def test_wrong_inputs_are_refused() -> None:
    x, ids = features(4, 3, 0), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"features: expected float32, float16 or bfloat16"):
        native.nearest_neighbor_distance(x.double(), ids)
    with pytest.raises(TypeError, match=r"group_ids: expected dtype torch.int64"):
        native.nearest_neighbor_distance(x, ids.int())
    with pytest.raises(ValueError, match=r"features: expected shape \[N, D\], got \[4\]"):
        native.nearest_neighbor_distance(x[:, 0], ids)
