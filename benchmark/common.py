"""What several rooms of the benchmark share: a run's files, tables, and the interval of a mean."""

import csv
import sys
import zipfile
from pathlib import Path

import numpy as np
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
# Arguments that change nothing in what is learned, and those that did so in the runs of older scripts.
NAMES_OF_A_RUN = ("run_dir", "track", "checkpoint_interval", "runs_dir", "run_name", "resume")
NO_SETTINGS = (*NAMES_OF_A_RUN, "env_id", "seed", "device", "precision", "compile")  # have a column, or change rounding
CIRCUMSTANCES = ("device", "precision", "torch_threads", "machine", "git_commit")  # beside `versions`
CURVE_PARTS = 50


def speak_utf8() -> None:
    """Have this process print UTF-8 in any locale, as its texts have Greek letters, and paths byte by byte.

    Files that are read or written name their encoding where they are opened.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def is_whole(path: Path) -> bool:
    """Whether the file is there, and every part of it has the check sum with which torch.save wrote it."""
    try:
        with zipfile.ZipFile(path) as content:
            return content.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError):  # the last for a flag that damage has set
        return False


def read_events(run_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every metric of a run, but for the single episodes, which episodes.csv has."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for tag in sorted(events.Tags()["scalars"]):
        if not tag.startswith("charts/episodic_"):
            points = events.Scalars(tag)
            scalars[tag] = np.array([p.step for p in points]), np.array([p.value for p in points])
    return scalars


def parts(steps: np.ndarray, values: np.ndarray, last_step: int, count: int) -> list[tuple[int, float]]:
    """Mean of the values whose step lies in each of `count` equal parts of (0, last_step]; empty parts are left out."""
    edges = np.linspace(0, last_step, count + 1)
    part = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, count - 1)
    return [(round(edges[i + 1]), float(values[part == i].mean())) for i in range(count) if (part == i).any()]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position (n,), of as many as there are at the start."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def settings_text(args: dict) -> str:
    """A run's settings as one cell: every argument but those that name the run."""
    return " ".join(f"{name}={value}" for name, value in args.items() if name not in NO_SETTINGS)


def circumstance(config: dict, name: str) -> object:
    """One of CIRCUMSTANCES, from config.json itself or, for device and precision, its args. Raises KeyError."""
    return config[name] if name in config else config["args"][name]


def circumstances(config: dict) -> dict:
    """What a run was computed with and on, as cells of a table."""
    versions = " ".join(f"{name}={version}" for name, version in config["versions"].items())
    return {name: circumstance(config, name) for name in CIRCUMSTANCES} | {"versions": versions}


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over seeds by Student's t, values (seeds, ...) → low, high (...); nan for one seed.

    The percentile bootstrap would cover the mean of ten normal values in only 90 % of cases, of three in 75 %.
    """
    seeds = len(values)
    half = stats.t.ppf(0.975, seeds - 1) * values.std(axis=0, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_episodes(run_dir: Path) -> np.ndarray:
    """Global step, return and length of a run's episodes, (episodes, 3); none if none has ended."""
    lines = (run_dir / "episodes.csv").read_text(encoding="utf-8").splitlines()[1:]
    return np.array([line.split(",") for line in lines], dtype=float).reshape(-1, 3)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
