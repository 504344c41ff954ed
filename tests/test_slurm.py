"""A real SLURM cluster of one node, started by slurm_cluster.sh, on which the launcher makes a suite as a job array."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_benchmark_run import ROOT, script, starts, words  # noqa: F401 - script is a fixture

CLUSTER = ["bash", str(ROOT / "tests" / "slurm_cluster.sh")]
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Environment variables with which SLURM's commands find the cluster; its daemons end with the tests."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster of one's own needs root")
    if any(shutil.which(daemon) is None for daemon in DAEMONS):
        if shutil.which("apt-get") is None:
            pytest.skip("SLURM is not installed, and there is no apt-get to install it")
        subprocess.run([*CLUSTER, "install"], check=True, timeout=900)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # munged refuses pytest's, which others cannot enter
        try:
            subprocess.run([*CLUSTER, "start", folder], check=True, timeout=120)
            yield os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
        finally:
            subprocess.run([*CLUSTER, "stop", folder], check=True, timeout=60)


def slurm(cluster: dict[str, str], *command: str) -> str:
    """What a command of SLURM's prints. Raises CalledProcessError if it fails."""
    return subprocess.run(command, env=cluster, check=True, capture_output=True, text=True, timeout=30).stdout


def wait_until(condition, seconds: float = 90) -> None:
    """Wait until the condition holds. Raises AssertionError if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@contextlib.contextmanager
def launch(cluster: dict[str, str], arguments: list[str]) -> Iterator[subprocess.Popen]:
    """Start the launcher on the cluster; should the test fail, it must not wait for a cluster that is gone."""
    slurm_flags = ["--executor=slurm", "--partition=test", "--time=5", "--cpus-per-task=1", "--array-parallelism=2"]
    command = [sys.executable, "-m", "benchmark.run", *arguments, *slurm_flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=cluster, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_suite_as_one_array_with_a_task_killed_and_requeued(cluster, script):  # noqa: F811
    with launch(cluster, words(script, "seconds=15", seeds=3)) as process:
        wait_until(lambda: starts(script))
        tasks = slurm(cluster, "squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        array = tasks[0].partition("_")[0]
        assert sorted(task.split()[0] for task in tasks) == [f"{array}_{index}" for index in range(3)]  # one array
        assert sum(task.endswith("RUNNING") for task in tasks) <= 2  # --array-parallelism
        seed = starts(script)[0]
        slurm(cluster, "scontrol", "requeue", f"{array}_{int(seed) - 1}")
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "3 of 3 runs are finished" in out and "FAILED" not in err
    assert sorted(starts(script)) == sorted(["1", "2", "3", seed])
    folder = script.parent / "results" / "smoke" / "fake" / "CartPole-v1"
    assert sorted(path.parent.name for path in folder.glob("*/done.json")) == ["1", "2", "3"]
    assert len(list(folder.glob("*.broken-*"))) == 1
    assert not (script.parent / "two at a time").exists()


def test_a_task_that_dies_without_a_word_is_named(cluster, script):  # noqa: F811
    with launch(cluster, words(script, "seconds=60")) as process:
        wait_until(lambda: starts(script))
        (job,) = slurm(cluster, "squeue", "--noheader", "--states=RUNNING", "--format=%i").split()
        slurm(cluster, "scancel", "--signal=KILL", job)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FAILED fake/CartPole-v1/1" in err and "0 of 1 runs are finished" in out


def test_a_task_whose_time_is_nearly_up_is_requeued_and_goes_on_from_its_checkpoint(cluster, tmp_path: Path):
    arguments = ["--suite=smoke", "--algorithms", "deep_spi", "--seeds=1", f"--results={tmp_path}"]
    folder = tmp_path / "smoke" / "deep_spi" / "CartPole-v1"
    with launch(cluster, arguments) as process:
        episodes = folder / "1" / "episodes.csv"
        wait_until(lambda: episodes.exists() and episodes.read_text().count("\n") > 20)
        (job,) = slurm(cluster, "squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
        slurm(cluster, "scancel", "--signal=USR2", job)  # what SLURM sends by itself 90 s before the end
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "1 of 1 runs are finished" in out and "FAILED" not in err
    (leg,) = json.loads((folder / "1" / "config.json").read_text())["resumes"]
    assert 0 < leg < 40_960
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]  # nothing was moved aside


def test_a_partition_that_does_not_exist_is_refused(cluster, script):  # noqa: F811
    arguments = [*words(script), "--executor=slurm", "--partition=no_such"]
    command = [sys.executable, "-m", "benchmark.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: --executor: got 'slurm'; sbatch refused the job array:" in done.stderr
    assert "invalid partition" in done.stderr


def test_the_smoke_suite_itself(cluster, tmp_path: Path):
    arguments = ["--suite=smoke", "--algorithms", "ppo", "deep_spi", "--seeds=1", f"--results={tmp_path}"]
    with launch(cluster, arguments) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "2 of 2 runs are finished" in out
    for algorithm in ("ppo", "deep_spi"):
        assert (tmp_path / "smoke" / algorithm / "CartPole-v1" / "1" / "done.json").exists()
