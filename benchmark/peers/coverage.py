"""What a rollout covers: parts of a script that add three metrics to its log, and may end the run before its schedule.

Of the N environments' last T observations, those after each step:

    coverage/distinct               number of different ones, over N T
    coverage/observation_variance   their variance; the mean over an observation's numbers (Atari: pixels, 0 to 255)
    coverage/latent_variance        the variance of their z = φ(s), with the φ after the update; the mean over z

Only the second has the same scale in every run: each run has its own φ, and floats are nearly always distinct. For the
study of parallelism (benchmark/PROTOCOL.md): the talk goes from 8 x 128 to 128 x 8 for the sake of coverage.
"""

from collections import deque
from types import ModuleType

import torch
from torch import Tensor


class EndOfRun(Exception):
    """All steps of the run are made, though its schedule would go on."""


def parts(script: ModuleType, args) -> dict[str, type]:
    """`Games` and `Run` to put in place of the script's own. The run ends, with EndOfRun, after args' steps."""
    seen = deque(maxlen=args.num_steps)  # observations (N, ...) of the last T steps

    class Games(script.Games):
        """The script's games, whose observations are kept."""

        def reset(self) -> Tensor:
            seen.append(super().reset())
            return seen[-1]

        def step(self, actions: Tensor) -> tuple:
            seen.append((result := super().step(actions))[0])
            return result

    class Run(script.Run):
        """The script's run. Its length is args', though the loop's schedule may be longer."""

        def __init__(self, _):
            super().__init__(args)

        def end_iteration(self, metrics: dict[str, float], ratios: Tensor, learned: dict) -> None:
            obs = torch.cat(list(seen))
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                z = learned["agent"].encode(obs.to(args.device)).float().flatten(1)
            metrics["coverage/distinct"] = share_of_distinct(obs)
            metrics["coverage/observation_variance"] = obs.flatten(1).float().var(0, correction=0).mean().item()
            metrics["coverage/latent_variance"] = z.var(0, correction=0).mean().item()
            super().end_iteration(metrics, ratios, learned)
            if (self.iterations + 1) * self.rollout > args.total_timesteps:
                raise EndOfRun

    return {"Games": Games, "Run": Run}


def share_of_distinct(obs: Tensor) -> float:
    """Number of different rows of obs (B, ...), over B."""
    return len({row.tobytes() for row in obs.numpy()}) / len(obs)
