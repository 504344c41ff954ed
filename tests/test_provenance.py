"""What a run says of its code: the commit, if the code is the commit's; and the folder's own copy of the script."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.test_resume import as_a_process

SCRIPTS = ("deep_spi_ppo.py", "deep_spi_ppo_atari.py", "deepmdp_ppo_atari.py", "ppo_baseline.py")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clean clone: the four scripts and a module committed, runs/ ignored."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    (folder / "more scripts").mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, folder)
    shutil.copy(ROOT / "ppo_baseline.py", folder / "more scripts" / "größer ☃.py")
    (folder / "module.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "All there is")
    git(folder, "tag", "v1")  # which must not stand for the commit
    return folder


def git(folder: Path, *words: str) -> str:
    who = [word for name in ("user.name=A", "user.email=a@b.c", "commit.gpgsign=false") for word in ("-c", name)]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def opened(script: Path, run_dir: Path) -> dict:
    """config.json of a run that this very file opens. It makes no step."""
    spec = importlib.util.spec_from_file_location("under_test", script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "under_test", module)  # where dataclasses look
        spec.loader.exec_module(module)
        with as_a_process(module):
            module.Run(module.Args(run_dir=str(run_dir), device="cpu"))
    config, path = (
        json.loads((run_dir / "config.json").read_text()),
        script.resolve(),
    )  # of a link: the code's own place
    assert config["script"] == path.name and config["script_path"] == str(path)
    assert (run_dir / path.name).read_bytes() == path.read_bytes()
    return config


def commit_of(script: Path, run_dir: Path) -> str | None:
    return opened(script, run_dir)["git_commit"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_what_is_committed_has_a_commit(script, repository, tmp_path):
    head = git(repository, "rev-parse", "HEAD")
    assert re.fullmatch(r"[0-9a-f]{40}", head)
    path = repository / script
    assert commit_of(path, tmp_path / "clean") == head
    shutil.copy(path, repository / "my_copy.py")
    assert commit_of(repository / "my_copy.py", tmp_path / "untracked") == head + "-untracked"
    assert commit_of(path, tmp_path / "beside it") == head
    with open(path, "a") as file:
        file.write("# changed\n")
    assert commit_of(path, tmp_path / "changed") == head + "-dirty"


def test_kinds_of_copies_and_changes(repository, tmp_path):
    head, path = git(repository, "rev-parse", "HEAD"), repository / "ppo_baseline.py"
    assert commit_of(repository / "more scripts" / "größer ☃.py", tmp_path / "odd name") == head
    shutil.copy(path, repository / "größer.py")
    assert commit_of(repository / "größer.py", tmp_path / "odd copy") == head + "-untracked"
    (repository / "runs" / "one").mkdir(parents=True)
    shutil.copy(path, repository / "runs" / "one")  # under the name of a tracked file, in a folder that Git ignores
    assert commit_of(repository / "runs" / "one" / path.name, tmp_path / "ignored") == head + "-untracked"
    (tmp_path / "link.py").symlink_to(path)
    assert commit_of(tmp_path / "link.py", tmp_path / "linked") == head
    (repository / "module.py").write_text("x = 2\n")  # what the script may import
    assert commit_of(path, tmp_path / "module") == head + "-dirty"
    git(repository, "checkout", "--quiet", "module.py")
    git(repository, "add", "größer.py")
    assert commit_of(repository / "größer.py", tmp_path / "staged") == head + "-dirty"
    git(repository, "commit", "--quiet", "--message", "One more")
    assert commit_of(repository / "größer.py", tmp_path / "committed") == git(repository, "rev-parse", "HEAD") != head


def test_there_is_no_commit(repository, tmp_path, monkeypatch):
    shutil.copy(ROOT / "ppo_baseline.py", tmp_path)
    assert commit_of(tmp_path / "ppo_baseline.py", tmp_path / "outside") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(ROOT / "ppo_baseline.py", empty)
    git(empty, "init", "--quiet")
    assert commit_of(empty / "ppo_baseline.py", tmp_path / "no commit yet") is None
    monkeypatch.chdir(repository)  # where the user stands says nothing of the script
    assert commit_of(tmp_path / "ppo_baseline.py", tmp_path / "elsewhere") is None
    monkeypatch.setenv("PATH", os.devnull)
    assert commit_of(repository / "ppo_baseline.py", tmp_path / "no git") is None


def test_script_run_from_its_own_folder_is_left_alone(tmp_path):
    """Not written anew: that would empty it first."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    script = run_dir / "deep_spi_ppo.py"
    shutil.copy(ROOT / script.name, script)
    script.chmod(0o444)
    before = script.stat()
    assert commit_of(script, run_dir) is None
    after = script.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert script.read_bytes() == (ROOT / script.name).read_bytes()


def test_env_id_with_a_slash_has_a_flat_folder(tmp_path, monkeypatch):
    """The default name of the run's folder."""
    import deep_spi_ppo

    monkeypatch.chdir(tmp_path)
    with as_a_process(deep_spi_ppo):
        deep_spi_ppo.Run(deep_spi_ppo.Args(env_id="phys2d/CartPole-v1", seed=7, device="cpu"))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"phys2d-CartPole-v1__deep_spi_ppo__7__\d+", run_dir.name)
    assert (run_dir / "config.json").exists()
