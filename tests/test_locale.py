"""In a locale that knows no letter beyond ASCII, what is printed is UTF-8, and files are the same as anywhere."""

import json
import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

SCRIPTS = ("deep_spi_ppo.py", "deep_spi_ppo_atari.py", "deepmdp_ppo_atari.py", "ppo_baseline.py")
LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "no UTF-8 mode either": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
SMALL = "--num-envs 4 --num-steps 32 --total-timesteps 256 --device cpu --update-epochs 1 --num-minibatches 1"


def start(script: str, flags: list[str | bytes], locale: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, which must be UTF-8."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("LANG", "PYTHONUTF8")}
    environment |= {"OMP_NUM_THREADS": "1", **locale}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def assert_helps(script: str, locale: dict[str, str]) -> None:
    code, out, err = start(script, ["--help"], locale)
    assert code == 0 and err == "", err
    for words in ("ε of the clip", "γ, discount factor", "Röpke", "π = π̄∘φ" if script == "ppo_baseline.py" else "α_P"):
        assert words in out
    assert "--run-dir" in out and "\\u" not in out and "�" not in out


def assert_runs(folder, locale: dict[str, str]) -> None:
    name = "Läufe ☃ 𝛑"
    flags = [*SMALL.split(), "--run-dir", str(folder / name)]
    code, out, err = start("deep_spi_ppo.py", flags, locale)
    assert code == 0 and "Error" not in err, err
    assert f"{folder / name}: complete" in out and name in err  # of the progress bar
    assert (folder / name / "agent.pt").exists()
    code, out, err = start("deep_spi_ppo.py", flags, locale)
    assert code == 0 and out == f"{folder / name}: complete; a larger --total-timesteps makes it longer\n" and err == ""
    assert json.loads((folder / name / "config.json").read_text(encoding="utf-8"))["script"] == "deep_spi_ppo.py"
    code, out, err = start("deep_spi_ppo.py", [*flags, "--env-id", "Größe ☃"], locale)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "error: --env-id: got" in err


def test_help_and_run_in_an_ascii_locale(tmp_path):
    assert_helps("ppo_baseline.py", LOCALES["ascii"])
    assert_runs(tmp_path, LOCALES["ascii"])


@pytest.mark.slow
def test_every_script_in_every_locale(tmp_path):
    for script in SCRIPTS:
        for locale in LOCALES.values():
            assert_helps(script, locale)


@pytest.mark.parametrize("flag", ["--run-dir", "--device"])
def test_bytes_that_are_not_utf8(flag, tmp_path):
    """A file system allows them, TensorBoard does not: refused, and what is printed is in order."""
    command = [
        sys.executable,
        str(ROOT / "deep_spi_ppo.py"),
        *SMALL.split(),
        flag,
        os.fsencode(tmp_path) + b"/L\xe4ufe",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=600)
    assert done.returncode == 2 and done.stdout == b"" and b"Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith(b"error: --run-dir: got " if flag == "--run-dir" else "╭─ ".encode())
    assert not list(tmp_path.iterdir())
