"""Muon, the optimiser of the embedded model's matrices.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
weight matrix by its nearest semi-orthogonal matrix, found by Newton-Schulz iteration. PyTorch has
its own from 2.9 on; this one also serves 2.8, works in float32 and stacks matrices of equal shape
into one batched product, which is what makes it cheap for many small matrices on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Quintic Newton-Schulz coefficients of the Muon write-up: steepest at zero, singular values end
# between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately: ``U S V^T`` becomes about ``U V^T``.

    Args:
        matrices: ``[K, rows, columns]`` floating point; an all-zero matrix stays zero.
        steps: Newton-Schulz iterations.

    Returns:
        The same shape and dtype; singular values between about 0.7 and 1.2.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-12)
    # Every step multiplies x by a polynomial of its Gram matrix. The polynomials commute, so they
    # are gathered among the small square matrices and x is multiplied once.
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    product = identity.expand_as(gram)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    result = product @ x
    return result.mT if tall else result


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised; step size scaled by ``sqrt(max(1, rows / columns))``.

    Args:
        params: two-dimensional parameters only.
        lr: learning rate.
        momentum: decay of the momentum.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"params: expected matrices, got a parameter of {list(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; a closure is not supported."""
        if closure is not None:
            raise ValueError("closure: expected None, Muon evaluates no closure")
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append((parameter, parameter.grad))
            for shape, members in same_shape.items():
                updates = []
                for parameter, gradient in members:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(gradient)
                    buffer = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                directions = orthogonalize(torch.stack(updates))
                for (parameter, _), update in zip(members, directions, strict=True):
                    parameter.add_(update, alpha=-scale)
