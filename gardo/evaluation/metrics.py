"""Statistics of evaluations: distance to real images, diversity, and means with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Mean of the finite values, their sample standard deviation, and how many they are.

    Attributes:
        mean: NaN without a finite value.
        std: with Bessel's correction; 0 for a single value, NaN for none.
        count: number of finite values.
    """

    mean: float
    std: float
    count: int


def summarize(values: Tensor) -> Summary:
    """Mean and standard deviation of ``[N]`` values in float64; non-finite ones are left out."""
    finite = values.double()[values.isfinite()]
    if len(finite) == 0:
        return Summary(math.nan, math.nan, 0)
    std = finite.std().item() if len(finite) > 1 else 0.0
    return Summary(finite.mean().item(), std, len(finite))


def feature_distance(features: Tensor, real_features: Tensor) -> Tensor:
    """Fréchet distance between Gaussians fitted to two sets of features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`` with sample covariances (Dowson
    and Landau, 1982; Heusel et al., 2017), in float64 with square roots by eigendecomposition of
    symmetric matrices, so that rank-deficient covariances are no trouble.

    Args:
        features: ``[N, D]`` floating point; rows that are not finite are left out.
        real_features: ``[M, D]``, likewise.

    Returns:
        0-d float64, at least 0; NaN if a set has fewer than two finite rows.

    Raises:
        ValueError: a shape is not as above.
    """
    for name, value in (("features", features), ("real_features", real_features)):
        _check_matrix(name, value)
    if features.shape[1] != real_features.shape[1]:
        raise ValueError(
            f"real_features: expected {features.shape[1]} columns as features has, "
            f"got {real_features.shape[1]}"
        )
    first, second = _finite_rows(features), _finite_rows(real_features.to(features.device))
    if min(len(first), len(second)) < 2:
        return first.new_tensor(math.nan)
    difference = first.mean(dim=0) - second.mean(dim=0)
    first_covariance, second_covariance = _covariance(first), _covariance(second)
    root = _matrix_sqrt(first_covariance)
    product = root @ second_covariance @ root
    # rounding leaves the product a little asymmetric and its zero eigenvalues a little negative
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    trace = first_covariance.trace() + second_covariance.trace() - 2 * cross
    return (difference.square().sum() + trace).clamp(min=0)


def mean_pairwise_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """Diversity: mean cosine distance of two images of a prompt group, times 100.

    The mean over all pairs of a group, then over the groups. Non-finite rows are left out, and so
    are groups with fewer than two rows. A zero row has distance 1 to every other.

    Args:
        features: ``[N, D]`` floating point.
        group_ids: ``[N]`` integers, in any order.

    Returns:
        0-d float64 in [0, 200]; NaN without a group of two.

    Raises:
        ValueError: a shape is not as above.
    """
    _check_matrix("features", features)
    if group_ids.shape != features.shape[:1]:
        raise ValueError(
            f"group_ids: expected shape [{len(features)}], got {list(group_ids.shape)}"
        )
    unit = F.normalize(_finite_rows(features), dim=1)
    groups, index = group_ids.to(features.device)[features.isfinite().all(dim=1)].unique(
        return_inverse=True
    )
    member = F.one_hot(index, max(len(groups), 1)).double()  # [N, groups]
    size = member.sum(dim=0)
    # the sum over the pairs of a group is |sum of its members|^2 less the members' own squares
    total = (member.T @ unit).square().sum(dim=1) - member.T @ unit.square().sum(dim=1)
    several = size > 1
    similarity = total[several] / (size * (size - 1))[several]
    return 100 * (1 - similarity).clamp(0, 2).mean()


def _check_matrix(name: str, value: Tensor) -> None:
    if value.ndim != 2:
        raise ValueError(f"{name}: expected shape [N, D], got {list(value.shape)}")


def _finite_rows(features: Tensor) -> Tensor:
    return features[features.isfinite().all(dim=1)].double()


def _covariance(rows: Tensor) -> Tensor:
    centered = rows - rows.mean(dim=0)
    return centered.T @ centered / (len(rows) - 1)


def _matrix_sqrt(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
