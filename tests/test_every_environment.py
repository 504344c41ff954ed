"""Every id that EnvPool lists is refused in one line, or works."""

import subprocess
import sys

import pytest

from tests.launch import ROOT

FEW = {  # id: the scripts that it works with, of the one for vectors and the one for Atari
    "CartPole-v1": ["deep_spi_ppo"],
    "phys2d/CartPole-v1": ["deep_spi_ppo"],
    "Taxi-v3": ["deep_spi_ppo"],
    "Highway-v0": ["deep_spi_ppo"],
    "Pong-v5": ["ppo_baseline"],
    "Chess-v1": [],  # two players and more, which its specification does not say
    "GardnerChess-v1": [],
    "AnimalShogi-v1": [],
    "IntersectionMultiAgent-v0": [],
    "IntersectionMultiAgent-v1": [],
    "CoinrunEasy-v0": [],  # needs system libraries
    "VizdoomCustom-v1": [],  # needs a file
    "Pendulum-v1": [],  # continuous actions
    "MiniGrid-Empty-5x5-v0": [],  # a dictionary of observations
}


def survey(*words: str) -> dict[str, set[str]]:
    """The ids that work with each script, in a process that has not used EnvPool yet."""
    command = [sys.executable, "-m", "tests.every_environment", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    lines = [line.split(": ", 2) for line in done.stdout.splitlines()]
    return {script: set(works.split()) for script, _, works in lines}


def test_a_dozen_environments():
    works = survey("--env-ids", *FEW)
    assert works == {name: {i for i in FEW if name in FEW[i]} for name in ("deep_spi_ppo", "ppo_baseline")}


@pytest.mark.slow
def test_every_environment():
    works = survey()
    assert len(works["deep_spi_ppo"]) >= 30 and len(works["ppo_baseline"]) >= 100
    assert not works["deep_spi_ppo"] & works["ppo_baseline"]
