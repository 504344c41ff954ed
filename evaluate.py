# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""Play episodes with a trained agent: python evaluate.py runs/<run name> [--episodes 20] [--video]

Works for a finished or an interrupted run of any training script here, or of a copy of one: the run's config.json names
the script, and the script's own functions build the environments, in the run's setting, and the agent. Each policy,
greedy and sampled, plays the same number of episodes, computed in float32. Writes evaluation.csv into the run's folder
(policy, return, length, ended: 0 if the episode was cut at --max-length) and prints a summary; --video adds a GIF of
each policy's first episode, from EnvPool's own pictures of the very game that is played.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import pickle
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

VIDEO_FRAMES = 1_800  # at most, two minutes
MILLISECONDS = 67  # a frame: four of Atari's 60 a second


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    episodes: int = 20
    """episodes that each policy plays; on Atari whole games"""
    policy: Literal["both", "greedy", "sampled"] = "both"
    """the most probable action, an action sampled as in training, or both, one after the other"""
    video: bool = False
    """also write greedy.gif and sampled.gif"""
    seed: int = 1_000_000
    """seed of the environments and of the sampled actions; another than the run's, to play games it has not seen"""
    max_length: int = 27_000
    """steps after which an episode is cut: some environments have no limit, and a policy may never end there"""
    script: Path | None = None
    """the training script, if it is no longer where config.json says"""


def check(allowed: bool, flag: str, given: object, rule: str) -> None:
    """Refuse a bad argument in one line; exit code 2."""
    if not allowed:
        print(f"error: {flag}: got {str(given)!r}; {rule}", file=sys.stderr)
        raise SystemExit(2)


def load_config(run_dir: Path) -> dict:
    """The run's config.json. Raises SystemExit(2) if there is none."""
    path = run_dir / "config.json"
    check(path.is_file(), "run", run_dir, "no run's folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        check(False, "run", run_dir, f"config.json is not JSON: {error}")
    whole = isinstance(config, dict) and {"script", "args"} <= config.keys()
    check(whole, "run", run_dir, "config.json does not describe a run: it has no script or no args")
    return config


def load_script(path: Path) -> ModuleType:
    """The training script as a module. Raises SystemExit(2) if it is not there."""
    known = path.is_file() and path.suffix == ".py"
    check(known, "--script", path, "there is no such training script, *.py; name it with --script")
    spec = importlib.util.spec_from_file_location(f"evaluated_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look up their annotations
    spec.loader.exec_module(script)
    return script


def load_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The agent's weights: agent.pt or those in checkpoint.pt, whichever was written last.

    Raises SystemExit(2) if there are neither, or if the checkpoint is damaged.
    """
    paths = [path for path in (run_dir / "agent.pt", run_dir / "checkpoint.pt") if path.is_file()]
    check(bool(paths), "run", run_dir, "it has neither agent.pt nor checkpoint.pt yet")
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)
    if path.name == "agent.pt":
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            check(False, "run", path, f"is damaged: {str(error).splitlines()[0]}")
    content = path.read_bytes()
    whole = hashlib.sha256(content[32:]).digest() == content[:32]
    check(whole, "run", path, "is damaged: its digest is not that of its content")
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)["agent"]


def sizes_of(script: ModuleType, env_id: str) -> tuple[int, int | None]:
    """Number of actions, and of a vector's inputs; None for frames."""
    sizes = script.check_env(env_id)
    return sizes if isinstance(sizes, tuple) else (sizes, None)


def make_agent(script: ModuleType, args: object) -> torch.nn.Module:
    """The script's agent, by the names of its constructor's parameters."""
    num_actions, num_inputs = sizes_of(script, args.env_id)
    known = {"num_actions": num_actions, "num_inputs": num_inputs, "generator": torch.Generator()} | vars(args)
    return script.Agent(**{name: known[name] for name in inspect.signature(script.Agent).parameters})


def observations(script: ModuleType, obs: np.ndarray, num_inputs: int | None) -> torch.Tensor:
    """Observations as the script's encoder takes them: vectors, or frames with channels last."""
    if num_inputs is not None:
        return torch.from_numpy(script.vectorize(obs, num_inputs))
    return torch.from_numpy(obs).permute(0, 2, 3, 1)


def play(
    script: ModuleType, agent: torch.nn.Module, args: object, greedy: bool, max_length: int, video: bool
) -> tuple[list[tuple[float, int, int]], list[np.ndarray]]:
    """One episode of each of args.num_envs fresh environments, as (return, length, ended), and pictures of the first.

    Each environment plays one, whatever its length: the first to end would be the short ones.
    """
    N, (_, num_inputs) = args.num_envs, sizes_of(script, args.env_id)
    rng = torch.Generator().manual_seed(args.seed)
    envs = script.make_envs(args)
    obs, _ = envs.reset()
    pictures = [envs.render()[0]] if video else []
    returns, lengths, ended = np.zeros(N), np.zeros(N, dtype=np.int64), np.zeros(N, dtype=bool)
    executed = np.zeros(N, dtype=np.int32)
    dummy, done = np.ones(N, dtype=bool), np.zeros(N, dtype=bool)  # the first step is as if after a dummy
    for _ in range(2 * max_length):  # rows of auto-reset after a lost life are no steps
        with torch.no_grad():
            log_probs, _ = agent.policy_and_value(agent.encode(observations(script, obs, num_inputs)))
        sampled = torch.multinomial(log_probs.exp(), num_samples=1, generator=rng).squeeze(-1)
        actions = (log_probs.argmax(-1) if greedy else sampled).numpy()
        repeat = (torch.rand(N, generator=rng).numpy() < getattr(args, "sticky", 0)) & ~dummy
        executed = np.where(repeat, executed, actions).astype(np.int32)
        obs, reward, terminated, truncated, info = envs.step(executed)
        dummy, done = done, terminated | truncated
        playing = ~ended & (lengths < max_length)
        returns += np.where(playing, info.get("reward", reward), 0)  # on Atari unclipped; 0 in a dummy row
        lengths += playing & ~dummy
        if video and playing[0] and len(pictures) < VIDEO_FRAMES:
            pictures.append(envs.render()[0])
        ended |= playing & ((info["terminated"].astype(bool) if "terminated" in info else terminated) | truncated)
        if (ended | (lengths >= max_length)).all():
            break
    return list(zip(returns.tolist(), lengths.tolist(), ended.astype(int).tolist(), strict=True)), pictures


def main(own: Args) -> None:
    """Evaluate the run."""
    check(own.episodes >= 1, "--episodes", own.episodes, "must be at least 1")
    check(own.max_length >= 1, "--max-length", own.max_length, "must be at least 1")
    check(0 <= own.seed < 2**63, "--seed", own.seed, "must lie in [0, 2^63)")
    config = load_config(own.run)
    beside = Path(__file__).parent / config["script"]  # for a run that was made on another machine
    path = own.script or next(filter(Path.is_file, (Path(config.get("script_path", "")), beside)), beside)
    script = load_script(path)
    check(hasattr(script, "Agent"), "--script", path, "has no Agent: it is not a training script of this kind")
    names = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: value for name, value in config["args"].items() if name in names})
    args.seed, args.num_envs = own.seed, own.episodes
    agent = make_agent(script, args)
    agent.load_state_dict(load_weights(own.run))
    if own.video:  # the script's own make_envs, but with pictures
        make = functools.partial(script.envpool.make, render_mode="rgb_array")
        script.envpool = SimpleNamespace(**{**vars(script.envpool), "make": make})
    rows = []
    for policy in ("greedy", "sampled") if own.policy == "both" else (own.policy,):
        played, pictures = play(script, agent, args, policy == "greedy", own.max_length, own.video)
        rows += [(policy, *episode) for episode in played]
        returns = [episode[0] for episode in played]
        spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
        print(f"{args.env_id}, {policy}: mean return {statistics.mean(returns):.2f} (standard deviation {spread:.2f})")
        if own.video:
            first, *others = [Image.fromarray(picture) for picture in pictures]
            first.save(own.run / f"{policy}.gif", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)
    with open(own.run / "evaluation.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("policy", "return", "length", "ended"), *rows])
    print(f"{own.run / 'evaluation.csv'}: {own.episodes} episodes of each policy")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}")
