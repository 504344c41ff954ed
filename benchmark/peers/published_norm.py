"""The published code's spectral norm, put in place of a script's own.

    with patch(deep_spi_ppo_atari):
        agent = deep_spi_ppo_atari.Agent(num_actions)

divides by what the published code divides by: two steps of power iteration from a start that is the same in every run.
The last of its vectors is left unnormalised, so that the divisor is near σ² where σ is meant. Works for scripts with
`SpectralLayer`: `deep_spi_ppo_atari` and `deep_spi_ppo`. A layer that was made under the patch keeps the rule.
`deep_spi_published_norm.py`, beside this file, trains with it.
"""

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor


def published_spectral_norm(matrix: Tensor, v: Tensor) -> Tensor:
    """The published code's divisor for each matrix (G, m, n), shape (G,): two power steps from the fixed start v (n,).

    Gradient flows through u and v.
    """
    v = v[:, None]
    for _ in range(2):
        v = v / (v.square().sum(-2, keepdim=True) + 1e-8).sqrt()
        u = matrix @ v
        u = u / (u.square().sum(-2, keepdim=True) + 1e-8).sqrt()
        v = matrix.mT @ u
    return (u * (matrix @ v)).sum((-2, -1))


def published_layer(script: ModuleType) -> type:
    """The script's `SpectralLayer`, but with the published divisor."""

    class PublishedLayer(script.SpectralLayer):
        def __init__(self, *shape: int, groups: int = 1):
            super().__init__(*shape, groups=groups)
            length = shape[0] if len(shape) == 2 else math.prod(shape[1:])
            start = torch.randn(length, generator=torch.Generator().manual_seed(0))
            self.register_buffer("power_start", start, persistent=False)  # the same in every run

        def follow(self) -> None:
            """Nothing: the power iteration starts anew in every forward."""

        def normalized_weight(self) -> Tensor:
            """The weight over the divisor, in float32."""
            with torch.autocast(self.weight.device.type, enabled=False):
                matrix = (
                    self.matrices().mT if self.weight.ndim == 2 else self.matrices()
                )  # there a linear layer's matrix is (in, out)
                sigma = published_spectral_norm(matrix, self.power_start)
                return (self.weight.view(self.groups, -1) * sigma.reciprocal()[:, None]).view_as(self.weight)

    return PublishedLayer


@contextlib.contextmanager
def patch(script: ModuleType) -> Iterator[None]:
    """Within it, the layers that the script module makes have the published rule. Raises AttributeError elsewhere."""
    with mock.patch.object(script, "SpectralLayer", published_layer(script)):
        yield
