"""The straightforward form of an Atari script: python -m benchmark.peers.plain SCRIPT [the script's own flags]

What the scripts do to be fast is undone here: float32 frames in (N, C, H, W) order, minibatches of independent
transitions with both frames encoded, a transition model that computes every action's outputs and keeps one, as the
published code does, and freed memory left to the system. Not undone: P̄'s noise is drawn once an iteration, and R̄'s
GroupSort is the script's. `benchmark.throughput` compares with it, and the tests take it as the simple definition.
"""

import importlib
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import deep_spi_ppo_atari

SCRIPTS = ("ppo_baseline", "deep_spi_ppo_atari")


class PlainTransitionModel(deep_spi_ppo_atari.TransitionModel):
    """P̄ with the outputs of all A actions computed in one grouped convolution, of which the taken action's are kept."""

    def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """A sample z̄' (B, h, w, C) of P̄(·|z, a), for z (B, h, w, C), actions (B,) and noise ε (B, *noise_shape)."""
        h, w, C = z.shape[1:]
        padded = F.pad(z.permute(0, 3, 1, 2), (0, 1, 0, 1))
        hidden = F.conv2d(padded, self.hidden.normalized_weight(), self.hidden.bias)  # (B, 2C, h, w)
        hidden = hidden.unflatten(1, (C, 2)).sort(dim=2).values.flatten(1, 2)
        padded = F.pad(hidden, (0, 1, 0, 1))
        outputs = F.conv2d(padded, self.components.normalized_weight(), self.components.bias, groups=self.G)
        rows = torch.arange(len(z), device=z.device)
        outputs = outputs.unflatten(1, (C, self.K, 2, self.A))[rows, :, :, :, actions]  # (B, C, K, 2, h, w)
        loc, scale = 0.5 * outputs[:, :, :, 0], 0.5 * F.softplus(outputs[:, :, :, 1])  # (B, C, K, h, w)
        flat = hidden.permute(0, 2, 3, 1).flatten(1)
        logits = F.linear(flat, self.mixture.normalized_weight(), self.mixture.bias)
        weights = logits.unflatten(1, (self.K, self.A))[rows, :, actions].softmax(-1)  # (B, K)
        noise = noise.view(-1, self.G, self.K, C // self.G, h, w).transpose(2, 3).flatten(1, 2)  # (B, C, K, h, w)
        components = loc + scale * noise.clamp(-1, 1)
        return (weights[:, None, :, None, None] * components).sum(2).permute(0, 2, 3, 1)


def make_plain(script):
    """Put the plain encoder and transition model in place of the script module's own. Returns the module."""

    class PlainAgent(script.Agent):
        def __init__(self, num_actions: int):
            super().__init__(num_actions)
            self.encoder.to(memory_format=torch.contiguous_format)

        def encode(self, obs: Tensor) -> Tensor:
            frames = obs.permute(0, 3, 1, 2).contiguous()  # the script has them channels last; about 1 % of an update
            return self.encoder(frames.float() / 255).permute(0, 2, 3, 1)

    script.Agent = PlainAgent
    script.ctypes = SimpleNamespace(CDLL=lambda _: None)  # without mallopt: freed memory goes back to the system
    if hasattr(script, "TransitionModel"):
        script.TransitionModel = PlainTransitionModel
    return script


def main() -> None:
    """Train as the script would, in the plain form. Exit code 2 for a script that has none."""
    name = sys.argv[1].removesuffix(".py") if len(sys.argv) > 1 else "nothing"
    if name not in SCRIPTS:
        print(f"error: SCRIPT: got {name!r}; must be one of {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    script = make_plain(importlib.import_module(name))
    script.train(tyro.cli(script.Args, args=[*sys.argv[2:], "--precision", "fp32", "--chunk-length", "1"]))


if __name__ == "__main__":
    main()
