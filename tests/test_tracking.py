"""--track with the wandb of requirements-dev.txt, offline: the run works, goes on, and its folder can be copied."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytest.importorskip("wandb")
SMALL = "--num-envs 4 --num-steps 32 --device cpu --update-epochs 1 --num-minibatches 1 --track"


def tracked(folder, steps: int, *flags: str) -> subprocess.CompletedProcess:
    """A run of so many steps, in a process of its own that stands in the folder."""
    command = [sys.executable, str(ROOT / "deep_spi_ppo.py"), *SMALL.split(), "--total-timesteps", str(steps), *flags]
    names = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HOME": str(folder), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=os.environ | names, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def test_tracked_offline_and_gone_on_with(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    tracked(tmp_path, 256, "--run-dir", "runs/one")
    first = json.loads((run_dir / "config.json").read_text())
    tracked(tmp_path, 512, "--run-dir", "runs/one")
    second = json.loads((run_dir / "config.json").read_text())
    assert first["id"] == second["id"] and second["resumes"] == [256]
    logs = sorted(path.name for path in (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert logs == [f"run-{first['id']}.wandb"] * 2  # under one id W&B joins them
    shutil.copytree(run_dir, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in run_dir.iterdir()}
    assert not [path for path in run_dir.rglob("*") if path.is_symlink() or path.is_dir()]
    assert {"agent.pt", "checkpoint.pt", "config.json", "deep_spi_ppo.py", "episodes.csv"} <= {
        path.name for path in run_dir.iterdir()
    }


@pytest.mark.slow
def test_tracked_in_the_folder_where_one_stands(tmp_path):
    """--run-dir .: W&B's own folder stands beside the run's, so that no link leads from the run into itself."""
    (tmp_path / "run").mkdir()
    tracked(tmp_path / "run", 256, "--run-dir", ".")
    assert (tmp_path / "wandb").is_dir() and not (tmp_path / "run" / "wandb").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
