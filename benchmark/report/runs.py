"""A suite's runs, as benchmark.run left them, for benchmark.report; and what is known of their tasks."""

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.common import CIRCUMSTANCES, read_table, running_mean
from benchmark.suites import RANDOM_PLAYER, SOLVED_AT

WINDOW = 100  # episodes
CURVE_POINTS = {True: 10, False: 50}  # of a curve of policies, which are kept at ten steps; of games in training

Key = tuple[str, str, int]  # algorithm, task, seed


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. Scores are nan if no episode has ended."""

    algorithm: str
    task: str  # the folder's name: an environment, or an environment with a setting
    seed: int
    config: dict  # config.json
    done: dict  # done.json: steps, minutes, sps
    ends: np.ndarray  # (episodes,) steps at which episodes ended
    returns: np.ndarray  # (episodes,)
    last: float  # mean return of the last 100 episodes
    best_window: float  # largest mean return of 100 consecutive episodes
    best_episode: float  # largest return
    began_early: float  # share of the last 100 episodes that began in the run's first half
    policies: dict[int, np.ndarray]  # step → returns of the games that its policy played anew, actions sampled

    @property
    def key(self) -> Key:
        return self.algorithm, self.task, self.seed

    @property
    def final(self) -> float:
        """Mean return of the games that the final policy played anew; nan if it played none."""
        return float(self.policies.get(self.done["steps"], np.array([np.nan])).mean())

    @property
    def game(self) -> str:
        """`Pong` of `Pong-v5`, or of `ALE/Pong-v5`."""
        return re.sub(r"-v\d+$", "", self.config["args"]["env_id"].rpartition("/")[2])

    @property
    def episodes(self) -> int:
        return len(self.returns)

    @property
    def scale(self) -> tuple[float, float] | None:
        """The scores that are 0 and 1 when normalised: a random player's, and the human's or that of a solved task."""
        if known := read_known_scores().get(self.game):
            return known["random"], known["human"]
        env_id = self.config["args"]["env_id"]
        return (RANDOM_PLAYER[env_id], SOLVED_AT[env_id]) if env_id in RANDOM_PLAYER else None

    def normalised(self, score: np.ndarray) -> np.ndarray:
        """A score on the task's scale. Raises TypeError if nobody knows one."""
        zero, one = self.scale
        return (score - zero) / (one - zero)

    def curve(self, points: np.ndarray, of_policies: bool) -> np.ndarray:
        """Return at each of `points` (p,), in steps: of the policies, linear between them, or of the last 100 games."""
        if of_policies:
            return np.interp(points, list(self.policies), [own.mean() for own in self.policies.values()], left=np.nan)
        return curve_of(self.ends, self.returns, points)


@dataclass(frozen=True)
class Results:
    """All that a suite's folder holds."""

    runs: list[FinishedRun]
    plan: dict[Key, dict] | None  # the runs to expect, and the settings by which each was meant to differ
    unfinished: list[Key]  # without done.json
    unreadable: dict[str, str]  # finished, but not to be trusted: folder → why
    broken: int  # folders that the launcher moved aside

    @functools.cached_property
    def algorithms(self) -> list[str]:
        return list(dict.fromkeys(run.algorithm for run in self.runs))

    @functools.cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run.task for run in self.runs))

    @functools.cached_property
    def scored_tasks(self) -> list[str]:
        """Tasks whose scores can be normalised."""
        return list(dict.fromkeys(run.task for run in self.runs if run.scale))

    @functools.cached_property
    def scale_name(self) -> str:
        """What a normalised score is called."""
        by_humans = all(run.game in read_known_scores() for run in self.runs if run.scale)
        return "human-normalised" if by_humans else "normalised"

    @functools.cached_property
    def by_final_policy(self) -> bool:
        """Whether runs are scored by what their final policies played anew: if all of them did."""
        return not any(np.isnan(run.final) for run in self.runs)

    @functools.cached_property
    def by_policies(self) -> bool:
        """Whether learning curves are of policies: if those of every run played anew, on the way and in the end."""
        return self.by_final_policy and all(len(run.policies) > 1 for run in self.runs)

    def score(self, run: FinishedRun) -> float:
        """A run's score: like that of all others."""
        return run.final if self.by_final_policy else run.last

    @property
    def score_name(self) -> str:
        return "final policy" if self.by_final_policy else f"last {WINDOW} episodes"

    def unlike_envs(self, tasks: Iterable[str]) -> str:
        """Says which numbers of environments the algorithms have on these tasks, if not the same; else nothing.

        Among more environments the games that have ended by a step are the shorter ones, and of older policies.
        """
        found = defaultdict(set)
        for run in self.runs:
            if run.task in set(tasks):
                found[run.algorithm].add(run.config["args"].get("num_envs", 1))
        if len(set().union(*found.values())) < 2:
            return ""
        return ", ".join(f"{name}: {' or '.join(map(str, sorted(numbers)))}" for name, numbers in found.items())

    def most_envs(self, task: str) -> set[str]:
        """The algorithms that have the number of environments which most have on this task; none if it is one alone."""
        numbers = {run.algorithm: run.config["args"].get("num_envs", 1) for run in self.runs if run.task == task}
        most, count = Counter(numbers.values()).most_common(1)[0]
        return {name for name, number in numbers.items() if number == most} if count > 1 else set()

    def name(self, keys: Iterable[Key]) -> str:
        """Runs in few words, see `name_runs`."""
        return name_runs(keys, {*self.tasks, *(task for _, task, _ in self.plan or [])})


def name_runs(keys: Iterable[Key], tasks: Iterable[str]) -> str:
    """Runs in few words: `ppo (seeds 1, 2 of Pong, Boxing; seeds 3 to 9 of every task)`, every one of `tasks`."""
    seeds = defaultdict(list)
    for algorithm, task, seed in sorted(set(keys)):
        seeds[algorithm, task].append(str(seed))
    alike = defaultdict(lambda: defaultdict(list))  # algorithm → seeds → tasks that have just these
    for (algorithm, task), own in seeds.items():
        alike[algorithm][tuple(own)].append(task)
    texts = []
    for algorithm, groups in alike.items():
        parts = []
        for own, where in groups.items():
            where = "every task" if len(where) > 1 and set(where) == set(tasks) else ", ".join(where)
            in_a_row = len(own) > 3 and int(own[-1]) - int(own[0]) == len(own) - 1
            named = f"{own[0]} to {own[-1]}" if in_a_row else ", ".join(own)
            parts.append(f"seed{'s' if len(own) > 1 else ''} {named} of {where}")
        texts.append(f"{algorithm} ({'; '.join(parts)})")
    return ", ".join(texts)


@functools.cache
def read_known_scores() -> dict[str, dict[str, float]]:
    """Per game: `random` and `human` score and `published_ppo`, with source in the file's header."""
    return pd.read_csv(Path(__file__).with_name("atari57_scores.csv"), comment="#", index_col="game").to_dict("index")


def curve_of(ends: np.ndarray, returns: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean return of the last 100 episodes that had ended by each of `points` (p,): of those there were, or nan."""
    means = np.concatenate(([np.nan], running_mean(returns, WINDOW)))
    return means[np.searchsorted(ends, points, side="right")]


def curve_points(end: float, of_policies: bool) -> np.ndarray:
    """Where a curve up to `end` has its points, equally spaced."""
    return np.linspace(0, end, CURVE_POINTS[of_policies] + 1)[1:]


def need(keys: set[str], content: object, name: str) -> None:
    """Raise ValueError unless the content, called `name`, is a JSON object with these keys."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    if lacking := keys - content.keys():
        raise ValueError(f"{name} lacks {', '.join(sorted(lacking))}")


def read_run(folder: Path) -> FinishedRun:
    """A finished run with its scores. Raises FileNotFoundError, or ValueError for files that cannot be right."""
    config, done = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "done.json"))
    need({"script", "args"}, config, "config.json")
    need({"versions", *CIRCUMSTANCES}, config["args"] | config, "config.json")
    need({"env_id", "total_timesteps"}, config["args"], "args of config.json")
    need(set(), config["versions"], "versions of config.json")
    numbers = {"steps", "minutes", "sps"}
    need(numbers, done, "done.json")
    if not all(isinstance(done[name], int | float) and np.isfinite(done[name]) for name in numbers):
        raise ValueError("in done.json a value is not a finite number")
    columns = {"global_step": "int64", "return": "float64", "length": "int64"}
    table = pd.read_csv(folder / "episodes.csv", usecols=list(columns), dtype=columns)
    ends, returns = table["global_step"].to_numpy(), table["return"].to_numpy()
    if (np.diff(ends) < 0).any():
        raise ValueError("in episodes.csv steps go back, as if two runs had written it")
    if not np.isfinite(returns).all():
        raise ValueError("in episodes.csv a return is not a finite number")
    scores = [np.nan] * 4
    if len(returns):
        starts = ends[-WINDOW:] - table["length"].to_numpy()[-WINDOW:] * config["args"].get("num_envs", 1)
        whole_windows = running_mean(returns, WINDOW)[min(WINDOW, len(returns)) - 1 :]
        scores = [returns[-WINDOW:].mean(), whole_windows.max(), returns.max(), (starts < done["steps"] / 2).mean()]
    algorithm, task, seed = folder.parts[-3:]
    key = algorithm, task, int(seed)
    policies = read_policies(folder, done["steps"])
    return FinishedRun(*key, config, done, ends, returns, *map(float, scores), policies)


def read_policies(folder: Path, last_step: int) -> dict[int, np.ndarray]:
    """Per step, in order, the returns of the games that its policy played anew, actions sampled.

    Those of the final policy are in evaluation.csv, those of policies on the way in policies.csv. Raises ValueError.
    """
    games = defaultdict(list)
    for name, steps in (("policies.csv", None), ("evaluation.csv", last_step)):
        for row in read_table(folder / name):
            value = float(row["return"])
            if not np.isfinite(value):
                raise ValueError(f"in {name} a return is not a finite number")
            if row["policy"] == "sampled":
                games[steps or int(row["global_step"])].append(value)
    return {step: np.array(games[step]) for step in sorted(games)}


def read_plan(path: Path) -> dict[Key, dict]:
    """The runs to expect, with the settings that the plan names. Raises ValueError that names the file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {(row["algorithm"], row["label"], int(row["seed"])): dict(row.get("flags", {})) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of runs: {error!r}") from None


def read_results(suite: Path) -> Results:
    """Every run of a suite, in the plan's order (else by name). An unreadable one is kept apart, with the reason.

    Raises ValueError if plan.json is unreadable.
    """
    plan = read_plan(suite / "plan.json") if (suite / "plan.json").exists() else None
    runs, unfinished, unreadable = [], [], {}
    for folder in sorted(suite.glob("*/*/*")):
        algorithm, task, seed = folder.parts[-3:]
        if not seed.isdecimal():
            continue
        if not (folder / "done.json").exists():
            unfinished.append((algorithm, task, int(seed)))
            continue
        try:
            runs.append(read_run(folder))
        except FileNotFoundError as error:
            unreadable[f"{algorithm}/{task}/{seed}"] = f"there is no {Path(error.filename).name}"
        except ValueError as error:
            unreadable[f"{algorithm}/{task}/{seed}"] = str(error)
    names = list(dict.fromkeys(name for algorithm, task, _ in plan or [] for name in (algorithm, task)))
    rank = {name: i for i, name in enumerate(names)}
    runs.sort(key=lambda run: (rank.get(run.algorithm, len(rank)), rank.get(run.task, len(rank)), run.key))
    return Results(runs, plan, unfinished, unreadable, broken=len(list(suite.glob("*/*/*.broken-*"))))
