"""Parity with the published code: python -m tests.parity CASE.npz [CASE.npz ...]

Each case in `tests/golden/` holds numbers computed by the published code of Deep SPI, DeepMDP or (`parity_dreamspi.py`)
DreamSPI, on inputs that are drawn again here from the case's seed. The parameters are loaded into the script's own
modules and the script's own functions are run, in float32. Two things of the published code are no part of a script and
are put in its place here: its spectral norm, as a patch, and its rule that z' = z where an episode is over. One line
per quantity: name, error, tolerance, pass or fail. Exit code 1 if any fails, 2 if a case is missing or malformed.
Format and rules: `tests/golden/README.md`.
"""

import argparse
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import deep_spi_ppo_atari
import deepmdp_ppo_atari
from benchmark.peers import published_norm

FORWARD_TOLERANCE, GRADIENT_TOLERANCE, STEP_TOLERANCE = 1e-4, 1e-4, 1e-5
SCRIPTS = {"deepspi": deep_spi_ppo_atari, "deepmdp": deepmdp_ppo_atari}

SHARED_MODULES = {
    "actor/Dense_0": "actor",
    "conv/Conv_0": "encoder.0",
    "conv/Conv_1": "encoder.2",
    "conv/Conv_2": "encoder.4",
    "critic/Dense_0": "critic",
    "fc/Dense_0": "fc",
}
MODULES = {  # published name: the script's
    "deepspi": SHARED_MODULES
    | {
        "reward/SpectralDense_0": "reward_model.hidden1",
        "reward/SpectralDense_1": "reward_model.hidden2",
        "reward/SpectralDense_2": "reward_model.output",
        "transition/SpectralConv_0": "transition_model.hidden",
        "transition/SpectralConv_1": "transition_model.components",
        "transition/SpectralDense_0": "transition_model.mixture",
    },
    "deepmdp": SHARED_MODULES
    | {
        "reward/Dense_0": "reward_model.hidden",
        "reward/Dense_1": "reward_model.output",
        "transition/Conv_0": "transition_model.conv",
    },
}


class MalformedCase(Exception):
    """The file is no case this program knows how to read."""


class Comparison(NamedTuple):
    """One quantity: its name, our error as the golden README defines it, and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def relative_error(ours: Tensor | np.ndarray | float, stored: np.ndarray | float) -> float:
    """max|Δ| / max|stored|, over the whole array; max|Δ| where all that is stored is 0."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if ours.shape != np.shape(stored):
        return math.inf
    scale = np.abs(stored).max()
    return float(np.abs(ours - stored).max() / (scale if scale > 0 else 1.0))


def hwio(parameter: Tensor) -> Tensor:
    """A parameter or gradient of ours in the published layout: kernels HWIO, linear weights (in, out)."""
    if parameter.ndim == 4:
        return parameter.permute(2, 3, 1, 0)
    return parameter.mT if parameter.ndim == 2 else parameter


def from_hwio(array: np.ndarray) -> Tensor:
    """The inverse of `hwio`, from numpy."""
    tensor = torch.from_numpy(array)
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.mT if tensor.ndim == 2 else tensor


def make_agent(script: ModuleType, algorithm: str, num_actions: int) -> torch.nn.Module:
    """The script's agent, to be filled with a case's parameters."""
    if algorithm == "deepspi":
        with published_norm.patch(script):
            return script.Agent(num_actions)
    return script.Agent(num_actions)


def named_parameters(agent: torch.nn.Module, algorithm: str) -> dict[str, torch.nn.Parameter]:
    """The agent's parameters under their published names, in sorted order."""
    parameters = {}
    for published, ours in MODULES[algorithm].items():
        module = agent.get_submodule(ours)
        parameters[f"{published}/bias"], parameters[f"{published}/kernel"] = module.bias, module.weight
    assert len(parameters) == len(list(agent.parameters())), "a parameter of the script has no published name"
    return dict(sorted(parameters.items()))


def components(model: torch.nn.Module, z: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, K), loc and scale (B, K, h·w·C) of the mixture P̄, found by sampling, as the script mixes first.

    With all weight on component k, the sample with noise 0 is loc_k, and with noise 1 it is loc_k + scale_k. The
    weights are those with which the loc_k mix to the sample with noise 0.
    """
    noise = torch.zeros(len(z), *model.noise_shape)
    mean = model(z, actions, noise).flatten(1)
    start, locs, scales = model.mixture.bias.clone(), [], []
    for k in range(model.K):
        model.mixture.bias.view(model.K, -1)[k] += 1e4
        locs.append(model(z, actions, noise).flatten(1))
        scales.append(model(z, actions, noise + 1).flatten(1) - locs[-1])
        model.mixture.bias.copy_(start)
    loc = torch.stack(locs, dim=1)  # (B, K, h·w·C)
    weights = torch.linalg.lstsq(loc.mT.double(), mean[:, :, None].double()).solution.squeeze(-1)
    return weights.float(), loc, torch.stack(scales, dim=1)


def check_agent(case: dict[str, np.ndarray], script: ModuleType | None = None) -> Iterator[Comparison]:
    """Compare the script's agent with a case's numbers. `script` may be given to test an altered one."""
    algorithm, seed = str(case["algorithm"]), int(case["seed"])
    num_actions, rows = int(case["num_actions"]), int(case["batch"])
    if algorithm == "dreamspi":  # imported here, as that file reads this one
        from tests.parity_dreamspi import check_dreamspi

        yield from check_dreamspi(case, script)
        return
    if algorithm not in MODULES:
        raise MalformedCase(f"unknown algorithm {algorithm!r}; known: {', '.join(MODULES)}, dreamspi")
    script = script or SCRIPTS[algorithm]
    agent = make_agent(script, algorithm, num_actions)
    parameters = named_parameters(agent, algorithm)

    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            shape = tuple(hwio(parameter).shape)
            std = 0.05 if name.endswith("bias") else math.sqrt(1 / math.prod(shape[:-1]))
            parameter.copy_(from_hwio((std * random.standard_normal(shape)).astype(np.float32)))
        for module in agent.modules():
            if hasattr(module, "power_start"):
                module.power_start.copy_(torch.from_numpy(case[f"power_start/{len(module.power_start)}"]))
    obs = torch.from_numpy(random.randint(0, 256, (rows, 4, 84, 84)).astype(np.uint8)).permute(0, 2, 3, 1)
    next_obs = torch.from_numpy(random.randint(0, 256, (rows, 4, 84, 84)).astype(np.uint8)).permute(0, 2, 3, 1)
    actions = torch.from_numpy(random.randint(0, num_actions, rows))
    rewards = torch.from_numpy(random.randint(-1, 2, rows).astype(np.float32))
    dones = torch.from_numpy(random.rand(rows) < 0.2)
    advantages = torch.from_numpy(random.standard_normal(rows).astype(np.float32))
    returns = torch.from_numpy(random.standard_normal(rows).astype(np.float32))
    random.standard_normal(rows)  # the noise of old_logprob, which is stored
    noise = torch.from_numpy(random.standard_normal((rows, 5, 7, 7, 64)).astype(np.float32))
    if algorithm == "deepspi":  # as the script draws it: cut, and a group's channels before positions
        groups, num_components, _ = agent.transition_model.noise_shape
        noise = (
            noise.view(rows, num_components, 49, groups, 64 // groups).permute(0, 3, 1, 4, 2).flatten(3).clamp(-1, 1)
        )

    with torch.no_grad():  # the case knows only the taken actions' old probabilities; the loss uses no other
        old_log_probs, _ = agent.policy_and_value(agent.encode(obs))
        old_log_probs.scatter_(1, actions[:, None], torch.from_numpy(case["old_logprob"])[:, None])
    after = torch.where(dones[:, None, None, None], obs, next_obs)  # the published rule for finished episodes: z' = z
    batch = script.Transitions(
        obs=torch.stack((obs, after), dim=1),  # chunks of one step
        actions=actions,
        rewards=rewards,
        old_log_probs=old_log_probs,
        advantages=advantages,
        returns=returns,
        mask=torch.ones(rows),
    )
    penalty = {"gradient_penalty_coef": float(case["gradient_penalty_coef"])} if algorithm == "deepmdp" else {}
    args = script.Args(**penalty)
    with_noise = (noise,) if algorithm == "deepspi" else ()

    def compare(name: str, ours: Tensor) -> Comparison:
        return Comparison(name, relative_error(ours, case[name]), FORWARD_TOLERANCE)

    with torch.no_grad():
        z, next_z = script.latents(agent, batch)
        actor_outputs = []
        hook = agent.actor.register_forward_hook(lambda _, __, output: actor_outputs.append(output))
        log_probs, values = agent.policy_and_value(z)
        hook.remove()
        reward_pred = agent.reward_model(z, actions)
        predicted = agent.transition_model(z, actions, *with_noise)
        yield compare("logits", actor_outputs[0])
        yield compare("value", values)
        yield compare("z_sum", z.flatten(1).sum(-1))
        yield compare("z_next_sum", agent.encode(next_obs).flatten(1).sum(-1))
        yield compare("new_logprob", log_probs.gather(1, actions[:, None]).squeeze(1))
        yield compare("entropy_per_sample", -(log_probs.exp() * log_probs).sum(-1))
        yield compare("reward_pred", reward_pred)
        yield compare("reward_loss_per_sample", script.reward_loss(reward_pred, rewards))
        yield compare("transition_loss_per_sample", script.transition_loss(predicted, next_z))
        if algorithm == "deepspi":
            weights, loc, scale = components(agent.transition_model, z, actions)
            yield compare("mix_weights", weights)
            yield compare("loc_mean", loc.mean(-1))
            yield compare("scale_mean", scale.mean(-1))

    loss, stats = script.compute_loss(agent, batch, args, *with_noise)
    loss.backward()
    yield compare("loss", loss)
    yield compare("pg_loss", stats["losses/policy_loss"])
    yield compare("v_loss", stats["losses/value_loss"])
    yield compare("entropy", stats["losses/entropy"])
    yield compare("approx_kl", stats["losses/approx_kl"])
    yield compare("gradient_penalty", stats.get("world_model/gradient_penalty", torch.zeros(())))

    random = np.random.RandomState(seed + 7919)
    for name, parameter in parameters.items():
        gradient = hwio(parameter.grad).double().numpy()
        norm = float(case[f"grad_norm/{name}"])
        norm_error = abs(np.linalg.norm(gradient) - norm) / norm
        projection = (gradient * random.standard_normal(gradient.shape)).sum()
        projection_error = abs(projection - float(case[f"grad_proj/{name}"])) / norm
        yield Comparison(f"grad_norm/{name}", norm_error, GRADIENT_TOLERANCE)
        yield Comparison(f"grad_proj/{name}", projection_error, GRADIENT_TOLERANCE)

    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    losses = []
    for _ in range(5):
        loss, _ = script.compute_loss(agent, batch, args, *with_noise)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
    for i, (ours, stored) in enumerate(zip(losses, case["five_step_losses"], strict=True)):
        yield Comparison(f"five_step_losses[{i}]", abs(ours - float(stored)), STEP_TOLERANCE)
    for name, parameter in parameters.items():
        moved = (parameter.detach() - start[name]).double().norm().item()
        error = abs(moved - float(case[f"five_step_delta_norm/{name}"]))
        yield Comparison(f"five_step_delta_norm/{name}", error, STEP_TOLERANCE)


def check_gae(case: dict[str, np.ndarray], script: ModuleType | None = None) -> Iterator[Comparison]:
    """Compare `compute_gae` with a case's numbers on its real rows."""
    dones = np.concatenate((case["dones"], case["next_done"][None])).astype(bool)  # (T+1, N)
    values = np.concatenate((case["values"], case["next_value"][None]))
    advantages, returns = (script or deep_spi_ppo_atari).compute_gae(
        torch.from_numpy(case["rewards"]),
        torch.from_numpy(values),
        torch.from_numpy(dones),  # no time limits: every end is a terminal state
        torch.from_numpy(dones),
        float(case["gamma"]),
        float(case["gae_lambda"]),
    )
    real = ~dones[:-1]
    for name, ours in (("advantages", advantages), ("returns", returns)):
        yield Comparison(name, relative_error(ours.numpy()[real], case[name][real]), FORWARD_TOLERANCE)


def check_case(path: Path, script: ModuleType | None = None) -> list[Comparison]:
    """Every comparison of one case. Raises MalformedCase where it cannot be read as one."""
    try:
        with np.load(path) as file:
            case = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MalformedCase(f"cannot be read as .npz: {error}") from error
    if "algorithm" not in case and "next_value" not in case:
        raise MalformedCase("has neither `algorithm` (an agent's case) nor `next_value` (GAE)")
    try:
        return list(check_agent(case, script) if "algorithm" in case else check_gae(case, script))
    except KeyError as error:
        raise MalformedCase(f"lacks {error}") from error
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MalformedCase(f"does not fit the format: {reason}") from error


def main(arguments: list[str] | None = None) -> None:
    """The command line: `arguments`, or those of the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.npz")
    failed = 0
    for path in parser.parse_args(arguments).cases:
        try:
            comparisons = check_case(path)
        except MalformedCase as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        for name, error, tolerance in comparisons:
            verdict = "pass" if error <= tolerance else "FAIL"
            print(f"{path.stem:20} {name:50} {error:9.2e} <= {tolerance:.0e}  {verdict}")
        failed += sum(not comparison.passed for comparison in comparisons)
    print(f"{failed} quantities differ" if failed else "all quantities agree with the published code")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
