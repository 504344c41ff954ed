"""Other forms of P̄, put in place of a script's own, for the study "can P̄ learn?" (benchmark/PROTOCOL.md).

- `scale`: what ½ softplus(y) is at the start, where the script's is 0.35: the noise alone then costs less.
- `residual`: z̄' = z + Δ, Δ what the script's P̄ gives. Predicting no change is then Δ = 0, and needs no learning.
  It loosens the bound: where P̄ is K-Lipschitz in z, z + Δ is (1 + K)-Lipschitz only. The theorems' K_V, which is
  K_R / (1 - γ K_P) for γ K_P < 1, is then no bound any more: with K = 1 and γ = 0.99 there is none.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

SCRIPTS_SCALE = math.log(2) / 2  # ½ softplus(0)


def variant(script: ModuleType, scale: float, residual: bool) -> type:
    """The script's `TransitionModel`, with the scale at its start and the form that are asked for."""

    class Variant(script.TransitionModel):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            with torch.no_grad():  # biases are ordered (..., [x, y], A); at the start y is its bias, and a little
                self.components.bias.view(-1, 2, self.A)[:, 1] += math.log(math.expm1(2 * scale))

        def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
            """A sample z̄' of P̄(·|z, a), as in the script."""
            change = super().forward(z, actions, noise)
            return z.to(change.dtype) + change if residual else change

    return Variant


def check(args) -> None:
    """Refuse a scale that cannot be. Raises SystemExit(2)."""
    args.check("transition_scale", 0 < args.transition_scale < 10, "must lie in (0, 10)")
