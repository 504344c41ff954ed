# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""Play episodes with a trained agent: python evaluate.py runs/<run's folder> [--episodes 20] [--video]

Works for a finished or an interrupted run of any training script here, or of a copy of one: the run's folder holds the
very script, whose own `Games` and `Agent` are used. Each policy, greedy and sampled, plays the same number of episodes,
in the run's setting, computed in float32 on the CPU. Writes evaluation.csv into the run's folder (policy, return,
length, ended: 0 if the episode was cut at --max-length) and prints a summary. --video adds a GIF of each policy's first
episode: EnvPool's own pictures of the very game that is played, and below them what the agent thinks of it: V(s), and
R̄(s, a) of the action it takes, where it has a reward model.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.util
import inspect
import json
import pickle
import statistics
import sys
import typing
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal
from unittest import mock

import envpool
import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

VIDEO_FRAMES = 1_800  # at most, two minutes
MILLISECONDS = 67  # a frame: four of Atari's 60 a second
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")  # it has the R̄


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
    """the training script, for a run whose folder has no copy of it"""


def check(allowed: bool, flag: str, given: object, rule: str) -> None:
    """Refuse a bad argument in one line; exit code 2."""
    if not allowed:
        print(f"error: {flag}: got {str(given)!r}; {rule}", file=sys.stderr)
        raise SystemExit(2)


# ---- What the run's folder holds


def load_config(run_dir: Path) -> dict:
    """The run's config.json. Raises SystemExit(2) if there is none."""
    path = run_dir / "config.json"
    check(path.is_file(), "run", run_dir, "no run's folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        check(False, "run", run_dir, f"config.json is not JSON: {error}")
    whole = isinstance(config, dict) and {"script", "args"} <= config.keys()
    check(whole, "run", run_dir, "config.json does not describe a run: it has no script or no args")
    return config


def load_script(path: Path, beside: Path) -> ModuleType:
    """The training script as a module, with the modules that lie in the folder `beside`. Raises SystemExit(2)."""
    known = path.is_file() and path.suffix == ".py"
    check(known, "--script", path, "there is no such training script, *.py; name it with --script")
    if beside.is_dir() and str(beside) not in sys.path:
        sys.path.insert(0, str(beside))  # as Python does for a script that it starts
    spec = importlib.util.spec_from_file_location(f"evaluated_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(script)
    except ModuleNotFoundError as error:
        check(False, "--script", path, f"it needs the module {error.name}, which is not in {beside}")
    complete = all(hasattr(script, name) for name in ("Args", "Games", "Agent"))
    check(complete, "--script", path, "has no Args, Games or Agent: it is not a training script of this kind")
    return script


def script_of(run_dir: Path, config: dict, given: Path | None) -> ModuleType:
    """The script that is given, or the run's own copy, or else the one that lies where it did, or beside this file."""
    original = Path(config.get("script_path", ""))
    if given is not None:
        return load_script(given, given.resolve().parent)
    places = (run_dir / config["script"], original, Path(__file__).parent / config["script"])
    path = next(filter(Path.is_file, places), original)
    return load_script(path, original.parent if original.is_file() else path.resolve().parent)


def load_state(run_dir: Path) -> dict:
    """What checkpoint.pt holds, which is written last; if there is none, agent.pt's weights under "agent".

    Raises SystemExit(2) if there are neither, or if they are damaged.
    """
    path = next(filter(Path.is_file, (run_dir / "checkpoint.pt", run_dir / "agent.pt")), None)
    check(path is not None, "run", run_dir, "it has neither checkpoint.pt nor agent.pt yet")
    try:
        with zipfile.ZipFile(path) as content:  # its check sums, which torch.load does not look at
            damaged = content.testzip()
        check(damaged is None, "run", path, f"is damaged: {damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | {"agent": state["agent"]} if path.name == "checkpoint.pt" else {"agent": state}
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, NotImplementedError, pickle.UnpicklingError) as error:
        check(False, "run", path, f"is damaged: {(str(error).splitlines() or [repr(error)])[0]}")


def load_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The agent's newest weights. Raises SystemExit(2) if there are none, or if they are damaged."""
    return load_state(run_dir)["agent"]


def settings_of(script: ModuleType, config: dict, seed: int, num_envs: int) -> object:
    """The run's `Args`, but for a seed and a number of environments of our own, on the CPU.

    config.json has a Path as text and a tuple as a list; settings that the script no longer has are left out.
    """
    given = config["args"] | {"device": "cpu", "track": False, "run_dir": ""}
    types = typing.get_type_hints(script.Args)
    values = {field.name: given[field.name] for field in dataclasses.fields(script.Args) if field.name in given}
    for name, value in values.items():
        if value is not None and (types[name] is Path or Path in typing.get_args(types[name])):
            values[name] = Path(value)
        elif isinstance(value, list) and typing.get_origin(types[name]) is tuple:
            values[name] = tuple(value)
    args = script.Args(**values)
    for name, value in (("seed", seed), ("num_envs", num_envs)):  # past the rules for training, as 20 games may be
        object.__setattr__(args, name, value)
    return args


def make_agent(script: ModuleType, args: object, games: object, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The script's agent with these weights. Its constructor's parameters are attributes of its games, or settings.

    Raises SystemExit(2) for a parameter that is neither, and for weights of another agent.
    """
    known = {}
    for name, parameter in inspect.signature(script.Agent).parameters.items():
        source = next((source for source in (games, args) if hasattr(source, name)), None)
        if source is None and parameter.default is not parameter.empty:
            continue
        check(source is not None, "--script", name, "a parameter of Agent must be an attribute of Games, or a setting")
        known[name] = getattr(source, name)
    agent = script.Agent(**known)
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        check(False, "--script", script.__file__, f"the run's weights are not its agent's: {str(error).split(':')[0]}")
    return agent


# ---- Playing


class Film:
    """Pictures of the first of the games, each with a line below it; none if its environment has no pictures."""

    def __init__(self):
        self.pictures, self.problem = [], ""

    def take(self, games: object, caption: str) -> None:
        """The present picture, unless there are enough."""
        if self.problem or len(self.pictures) == VIDEO_FRAMES:
            return
        try:
            picture = Image.fromarray(games.envs.render()[0])
        except Exception as error:  # of the simulator's own choice; the episodes are worth having all the same
            self.problem = str(error)
            return
        size = max(11, picture.width // 20)
        framed = Image.new("RGB", (picture.width, picture.height + size + size // 2))
        framed.paste(picture)
        font = ImageFont.truetype(str(FONT), size)
        ImageDraw.Draw(framed).text((size // 3, picture.height), caption, fill="white", font=font)
        self.pictures.append(framed)

    def save(self, path: Path) -> None:
        """Write the GIF."""
        first, *others = self.pictures
        first.save(path, save_all=True, append_images=others, duration=MILLISECONDS, loop=0)


@torch.no_grad()
def play(
    agent: torch.nn.Module, games: object, args: object, greedy: bool, max_length: int, film: Film | None
) -> list[tuple[float, int, int]]:
    """The first episode of each of the games, as (return, length, ended).

    Each environment plays one, whatever its length: the first to end would be the short ones.
    """
    predicts = hasattr(agent, "reward_model") and getattr(args, "reward_loss_coef", 1) > 0  # else it learned nothing
    obs, played = games.reset(), {}
    while len(played) < args.num_envs:
        z = agent.encode(obs)
        if hasattr(agent, "policy"):  # a normal distribution: greedy is its mean
            (mean, log_std), values = agent.policy(z), agent.value(obs)
            actions = mean if greedy else mean + log_std.exp() * torch.randn_like(mean)
        else:
            log_probs, values = agent.policy_and_value(z)
            sampled = torch.multinomial(log_probs.exp(), num_samples=1).squeeze(-1)
            actions = log_probs.argmax(-1) if greedy else sampled
        if film and 0 not in played:
            reward = f"  R̄ {agent.reward_model(z, actions)[0]:+z.2f}" if predicts else ""
            film.take(games, f"V {values[0]:+z.2f}{reward}")
        obs, _, _, _, episodes = games.step(actions)
        for i, (episodic_return, length) in episodes.items():
            played.setdefault(i, (float(episodic_return), int(length), 1))
        for i in np.flatnonzero(games.lengths >= max_length):
            played.setdefault(int(i), (float(games.returns[i]), int(games.lengths[i]), 0))
    return [played[i] for i in range(args.num_envs)]


def main(own: Args) -> None:
    """Evaluate the run."""
    check(own.episodes >= 1, "--episodes", own.episodes, "must be at least 1")
    check(own.max_length >= 1, "--max-length", own.max_length, "must be at least 1")
    check(0 <= own.seed < 2**63, "--seed", own.seed, "must lie in [0, 2^63)")
    config = load_config(own.run)
    weights = load_weights(own.run)
    script = script_of(own.run, config, own.script)
    args = settings_of(script, config, own.seed, own.episodes)
    pictured = mock.patch.object(envpool, "make", functools.partial(envpool.make, render_mode="rgb_array"))
    rows, films, agent = [], {}, None
    for policy in ("greedy", "sampled") if own.policy == "both" else (own.policy,):
        torch.manual_seed(own.seed)
        with pictured if own.video else contextlib.nullcontext():
            games = script.Games(args)
        agent = agent or make_agent(script, args, games, weights)
        torch.manual_seed(own.seed)  # again, as the agent has drawn its first weights
        films[policy] = Film()
        played = play(agent, games, args, policy == "greedy", own.max_length, films[policy] if own.video else None)
        rows += [(policy, *episode) for episode in played]
        returns = [episode[0] for episode in played]
        spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
        print(f"{args.env_id}, {policy}: mean return {statistics.mean(returns):z.2f} (standard deviation {spread:.2f})")
    with open(own.run / "evaluation.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("policy", "return", "length", "ended"), *rows])
    print(f"{own.run / 'evaluation.csv'}: {own.episodes} episodes of each policy")
    for policy, film in films.items() if own.video else ():
        if film.problem:
            print(f"no video, as {args.env_id} has no pictures: {film.problem}")
            break
        film.save(own.run / f"{policy}.gif")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # in any locale: Greek letters, paths
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}")
