"""Does every Atari script play all 57 games? python -m benchmark.studies.every_game

Each script trains on each game for three small iterations, and the policy plays one new game, cut after 500 steps. It
need not learn. A pair of script and game is whole if the run ended with its files, its last step logged and finite
weights, and if evaluate.py played with them. Writes results/every_game.csv, a row a pair, with what went wrong, if
anything did; pairs that are whole with the script's text of today are skipped. Exit code 1 if a pair is not whole.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from benchmark.common import RESULTS, ROOT, markdown, read_events, read_table
from benchmark.suites import ATARI57_GAMES, AUXILIARY

FILE = RESULTS / "every_game.csv"
SCRIPTS = sorted({algorithm.script for algorithm in AUXILIARY.values()} | {"dream_spi_atari.py"})
SMALL = {"num_envs": 8, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 192, "device": "cpu"}
CUT_AT = 500
NEW_LINE = "\n"
STOPPED = 75  # the exit code of a script that was sent a signal to stop
COLUMNS = ("script", "text", "game", "actions", "steps", "evaluation_steps", "problem")


def text_of(script: str) -> str:
    """What names the script's text: the first twelve digits of its SHA-256."""
    return hashlib.sha256((ROOT / script).read_bytes()).hexdigest()[:12]


def check(module, game: str, folder: Path) -> dict:
    """Train and evaluate; how many actions and steps it had. Raises AssertionError if the run is not whole."""
    run_dir = folder / game
    module.train(module.Args(env_id=f"{game}-v5", run_dir=str(run_dir), **SMALL))
    steps = int(read_events(run_dir)["charts/SPS"][0][-1])
    assert steps == SMALL["total_timesteps"], f"the last step logged is {steps}"
    for name in ("config.json", "episodes.csv", "checkpoint.pt", "agent.pt", f"{Path(module.__file__).name}"):
        assert (run_dir / name).is_file(), f"there is no {name}"
    weights = evaluate.load_weights(run_dir)
    assert all(weight.isfinite().all() for weight in weights.values()), "a weight is not finite"
    evaluate.main(evaluate.Args(run_dir, episodes=1, policy="sampled", max_length=CUT_AT))
    (played,) = read_table(run_dir / "evaluation.csv")
    assert 0 < int(played["length"]) <= CUT_AT or played["ended"] == "1", f"the evaluation has {played['length']} steps"
    return {"actions": len(weights["actor.bias" if "actor.bias" in weights else "actor.2.bias"])} | {
        "steps": steps,
        "evaluation_steps": played["length"],
    }


def rows_of(script: str, games: list[str]) -> Iterator[dict]:
    """A row for each game, as it is finished. A pair that fails has its last line as its problem."""
    module = importlib.import_module(Path(script).stem)
    for game in games:
        row = {"script": script, "text": text_of(script), "game": game, "problem": ""}
        with tempfile.TemporaryDirectory() as folder:
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    row |= check(module, game, Path(folder))
            except SystemExit as error:
                if error.code == STOPPED:
                    raise
                row["problem"] = f"SystemExit {error.code}: {said.getvalue().strip().rpartition(NEW_LINE)[2]}"
            except Exception as error:  # of any kind: it is what is looked for, and is written down
                row["problem"] = f"{type(error).__name__}: {str(error).strip().partition(NEW_LINE)[0]}"
        yield row


def key(row: dict) -> tuple[str, str]:
    """Script and game."""
    return row["script"], row["game"]


def make(script: str) -> None:
    """The pairs of one script that are missing or were not whole, each written as it is finished."""
    whole = {key(row) for row in read_table(FILE) if row["text"] == text_of(row["script"]) and not row["problem"]}
    games = [game for game in ATARI57_GAMES if (script, game) not in whole]
    for new in tqdm(rows_of(script, games), script, total=len(games)):
        kept = {key(row): row for row in read_table(FILE)} | {key(new): new}
        with open(FILE, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept[name] for name in sorted(kept))


def table() -> str:
    """Markdown: a row a game, "whole" where script and game are."""
    kept, lines = {key(row): row for row in read_table(FILE)}, []
    for game in ATARI57_GAMES:
        rows = [kept.get((script, game)) for script in SCRIPTS]
        actions = next((row["actions"] for row in rows if row and row["actions"]), "")
        lines.append([game, actions, *("not run" if not row else row["problem"] or "whole" for row in rows)])
    return markdown(["game", "actions", *(f"`{script}`" for script in SCRIPTS)], lines)


def main(words: list[str] | None = None) -> None:
    """Every script in a process of its own; or the one that is named."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.every_game", description=__doc__.splitlines()[0])
    parser.add_argument("script", nargs="?", choices=SCRIPTS, help="only this one, in this process")
    if script := parser.parse_args(words).script:
        torch.set_num_threads(1)  # layers of eight games gain nothing from a second
        make(script)
        return
    for script in SCRIPTS:  # one that dies leaves pairs that are missing
        code = subprocess.run([sys.executable, "-m", "benchmark.studies.every_game", script], cwd=ROOT).returncode
        if code in (STOPPED, -signal.SIGINT):
            raise SystemExit(code)
    whole = {key(row) for row in read_table(FILE) if not row["problem"]}
    missing = [(script, game) for script in SCRIPTS for game in ATARI57_GAMES if (script, game) not in whole]
    print(f"{len(whole)} pairs of script and game are whole; not: {missing or 'none'}")
    raise SystemExit(1 if missing else 0)


if __name__ == "__main__":
    main()
