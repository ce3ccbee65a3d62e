"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) in fp32, for the demo's base models.

`torch.optim.Muon` orthogonalises only in bf16. On a CPU without bf16 instructions a step of the demo's language model
then takes 3.1 CPU seconds, in fp32 0.3: 24 minutes against 2 for its 450 steps.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the paper's quintic
ITERATIONS = 5
MOMENTUM = 0.95
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each matrix; `torch.optim.Muon`'s defaults, without weight decay."""

    def __init__(self, matrices: Iterable[Tensor], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"]
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                direction = orthogonalised(matrix.grad.lerp(momentum, MOMENTUM))  # Nesterov
                rows, columns = matrix.shape
                matrix.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """[rows, columns] fp32 with singular values between 0.5 and 1.5, by Newton-Schulz iterations."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=EPSILON)  # the largest singular value is at most 1
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
