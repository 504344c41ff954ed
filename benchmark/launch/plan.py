"""What a suite's runs are: the plan, and each run's settings as its script would read them."""

import contextlib
import difflib
import fcntl
import functools
import importlib.util
import io
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro

from benchmark.common import NAMES_OF_A_RUN, ROOT
from benchmark.suites import Algorithm, Suite, Task

NAMED_BY_THE_PLAN = ("env_id", "seed", "total_timesteps", "run_dir")


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan. `label` names the task's folder: env_id, or a variant of it."""

    algorithm: str
    label: str
    env_id: str
    seed: int
    script: str
    flags: dict[str, object]
    total_timesteps: int

    @property
    def name(self) -> str:
        """The run's folder, relative to the suite's."""
        return f"{self.algorithm}/{self.label}/{self.seed}"


def check(allowed: bool, flag: str, given: object, rule: str) -> None:
    """Refuse a bad argument in one line. Raises SystemExit(2)."""
    if not allowed:
        print(f"error: --{flag}: got {given!r}; {rule}", file=sys.stderr)
        raise SystemExit(2)


def parse_algorithm(text: str, suite: Suite) -> tuple[str, Algorithm]:
    """An algorithm's name, and what it is: one of the suite's, or NAME=SCRIPT[:FLAG=VALUE,...].

    Raises SystemExit(2) for a name or a script that there is not.
    """
    name, is_new, definition = text.partition("=")
    if not is_new:
        rule = f"allowed: {', '.join(suite.algorithms)}, or NAME=SCRIPT[:FLAG=VALUE,...]"
        check(name in suite.algorithms, "algorithms", text, rule)
        return name, suite.algorithms[name]
    check(re.fullmatch(r"\w[\w.-]*", name) is not None, "algorithms", text, "NAME: letters, digits, '_', '-' and '.'")
    script, _, settings = definition.partition(":")
    check(script.endswith(".py"), "algorithms", text, f"SCRIPT is a Python file, *.py, not {script!r}")
    path = next((path for path in (Path(script).resolve(), ROOT / script) if path.is_file()), None)
    check(path is not None, "algorithms", text, f"there is no script {script}")
    flags = parse_settings(settings, "algorithms", text)
    return name, Algorithm(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path), flags)


def parse_settings(settings: str, of: str, text: str) -> dict[str, object]:
    """FLAG=VALUE,... as flags. Raises SystemExit(2) for a flag without a value."""
    flags = {}
    for setting in filter(None, settings.split(",")):
        flag, has_value, value = setting.partition("=")
        check(bool(has_value), of, text, f"settings are FLAG=VALUE,..., not {setting!r}")
        flags[flag.replace("-", "_")] = {"True": True, "False": False}.get(value, value)
    return flags


def parse_task(text: str, suite: Suite) -> Task:
    """A task: one of the suite's, by its label, or ENV_ID:STEPS[:FLAG=VALUE,...], whose flags are in its label.

    Raises SystemExit(2) for a task that there is not. Whether a script can play it, `settings_of` finds.
    """
    env_id, is_new, definition = text.partition(":")
    if not is_new:
        known = {task.label: task for task in suite.tasks}
        check(text in known, "tasks", text, f"allowed: {', '.join(known)}, or ENV_ID:STEPS[:FLAG=VALUE,...]")
        return known[text]
    steps, _, settings = definition.partition(":")
    check(env_id != "" and steps.isdecimal() and int(steps) > 0, "tasks", text, "STEPS: agent steps, at least 1")
    flags = parse_settings(settings, "tasks", text)
    variant = "-".join(f"{name}{value}" for name, value in flags.items())
    check(re.fullmatch(r"[\w.-]*", variant) is not None, "tasks", text, "VALUE: letters, digits, '_', '-' and '.'")
    return Task(env_id, int(steps), flags, variant)


def make_plan(suite: Suite, algorithms: dict[str, Algorithm], seeds: int) -> list[PlannedRun]:
    """Every run of the suite, seed by seed, so that an early stop leaves all algorithms with equally many."""
    return [
        PlannedRun(
            name, task.label, task.env_id, seed, algorithm.script, task.flags | algorithm.flags, task.total_timesteps
        )
        for seed in range(1, seeds + 1)
        for task in suite.tasks
        for name, algorithm in algorithms.items()
    ]


def flag_words(flags: dict[str, object]) -> list[str]:
    """Settings as words of a command line; a switch is --name or --no-name."""
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        words.append(f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}")
    return words


@functools.cache
def script_args(script: str) -> type:
    """The script's `Args`, which are its settings and their defaults. Raises SystemExit(2) if it has none."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"script {script}", path)  # a name that no import has
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    known, beside = set(sys.modules), str(path.parent)
    sys.path.insert(0, beside)  # as Python does for a script that it starts
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
        for name in set(sys.modules) - known:  # another script may have another module of that name beside it
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == path.parent != ROOT and "." not in name:
                del sys.modules[name]
    check(hasattr(module, "Args"), "algorithms", script, "the script needs its settings in a dataclass Args")
    lacking = set(NAMED_BY_THE_PLAN) - {field.name for field in fields(module.Args)}
    rule = f"the script's Args need {', '.join(sorted(lacking))}, which the launcher sets"
    check(not lacking, "algorithms", script, rule)
    return module.Args


@functools.cache
def parse_flags(script: str, words: tuple[str, ...]) -> dict[str, object]:
    """All settings of the script, as it would read them from this command line. Raises SystemExit(2) for bad ones."""
    args_class, said = script_args(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # tyro's own message is a box of many lines
            return vars(tyro.cli(args_class, args=words))
    except SystemExit:
        own = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        why = own[-1].removeprefix("error: ") if own else f"not a setting of {script}: see python {script} --help"
        of_task = why.startswith(("--env-id", "--total-timesteps"))
        check(False, "tasks" if of_task else "algorithms", " ".join(words), why)


def settings_of(run: PlannedRun) -> dict[str, object]:
    """Every setting that the run's config.json must have, as it will be there. Raises SystemExit(2) for bad ones."""
    allowed = [field.name for field in fields(script_args(run.script)) if field.name not in NAMED_BY_THE_PLAN]
    for flag in run.flags:
        closest = ", ".join(difflib.get_close_matches(flag, allowed, cutoff=0.4)) or ", ".join(allowed)
        check(flag in allowed, "algorithms", flag, f"not for an algorithm to set in {run.script}; closest: {closest}")
    task = {"env_id": run.env_id, "total_timesteps": run.total_timesteps}
    settings = parse_flags(run.script, tuple(flag_words(run.flags | task))) | {"seed": run.seed}
    # What the plan does not name of these is the machine's choice, which may be another than this one.
    not_compared = {*NAMES_OF_A_RUN, *(name for name in ("device", "precision") if name not in run.flags)}
    not_compared.discard("checkpoint_interval")  # which is not compared, but set by who makes the run
    settings = {name: value for name, value in settings.items() if name not in not_compared}
    return json.loads(json.dumps(settings, default=str))  # as config.json will have them: a Path is text there


def steps_of(settings: dict) -> int:
    """The last global step of a complete run: its steps, rounded down to whole rollouts."""
    rollout = settings.get("num_envs", 1) * settings.get("num_steps", 1)
    return settings["total_timesteps"] // rollout * rollout


def write_plan(path: Path, plan: list[PlannedRun]) -> None:
    """Write the runs in place of what the file had of them; runs planned earlier stay in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a", encoding="utf-8") as lock:  # other launchers may plan here too
        fcntl.flock(lock, fcntl.LOCK_EX)
        planned = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        runs = {(run["algorithm"], run["label"], run["seed"]): run for run in planned + [asdict(run) for run in plan]}
        write_json(path, list(runs.values()))


def write_json(path: Path, content: object) -> None:
    """Write the file so that whatever happens it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
