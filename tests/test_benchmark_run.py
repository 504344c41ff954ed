"""The launcher: what it refuses, skips, makes again, and that no kill loses or doubles a run.

All but one test use a training script that does nothing but write the files of one, so that they take no time.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import envpool
import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from benchmark.launch import launcher, plan, policies, worker
from benchmark.suites import ATARI57_GAMES, MEASURED_SPS, SUITES

ROOT = Path(__file__).parent.parent
STEPS = plan.steps_of({"total_timesteps": SUITES["smoke"].tasks[0].total_timesteps})

FAKE_SCRIPT = """
import fcntl, json, pathlib, shutil, sys, time, zipfile
from dataclasses import dataclass, fields

@dataclass
class Args:
    seed: int = 1
    env_id: str = ""
    total_timesteps: int = 1
    learning_rate: float = 0.1
    seconds: float = 0.0
    behaviour: str = "well"
    bad_seed: int = 0
    anneal: bool = True
    run_dir: str = ""

if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
    args = Args(**{f.name: f.type(given[f.name.replace("_", "-")]) for f in fields(Args)
                   if f.name.replace("_", "-") in given}, anneal="--no-anneal" not in sys.argv)
    behaviour = args.behaviour if args.bad_seed in (0, args.seed) else "well"
    run_dir = pathlib.Path(args.run_dir)
    going_on = (run_dir / "checkpoint.pt").exists()
    run_dir.mkdir(parents=True, exist_ok=going_on)
    alone = open(here / f"{run_dir.parents[1].name}-{args.seed}.alone", "w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (here / "two at a time").touch()
    with open(here / "starts", "a") as starts:
        starts.write(f"{args.seed}\\n")
    settings = vars(args) | ({"learning_rate": 9.9} if behaviour == "change" else {})
    (run_dir / "config.json").write_text(json.dumps({"script": "fake.py", "args": settings}))
    (run_dir / "episodes.csv").write_text("global_step,return,length\\n")
    time.sleep(args.seconds)
    if behaviour == "fail":
        sys.exit("the world model has melted")
    if behaviour in ("diverge", "full disk", "stop") and not going_on:
        with zipfile.ZipFile(run_dir / "checkpoint.pt", "w") as checkpoint:
            checkpoint.writestr("state", "state")
        diverged = "error: stopped at step 2048: losses/value_loss is not finite: nan"
        sys.exit({"diverge": diverged, "full disk": "error: [Errno 28] No space left", "stop": 75}[behaviour])
    if behaviour == "refuse" and going_on:
        sys.exit(2)
    if behaviour != "silent":
        events = "short" if behaviour == "short" else "whole"
        shutil.copy(here / events, run_dir / "events.out.tfevents.1")
    if behaviour != "weightless":
        (run_dir / "agent.pt").write_text("weights")
"""


@pytest.fixture
def script(tmp_path):
    """The path of the fake script; it appends its seed to `starts` beside it whenever it is started."""
    for name, step in (("whole", STEPS), ("short", STEPS // 2)):
        writer = RecordWriter(open(tmp_path / name, "wb"))
        value = Summary.Value(tag="charts/SPS", simple_value=1000.0)
        writer.write(Event(step=step, summary=Summary(value=[value])).SerializeToString())
        writer.close()
    path = tmp_path / "fake.py"
    path.write_text(FAKE_SCRIPT)
    return path


def starts(script: Path) -> list[str]:
    """The seeds of all runs started so far, in order."""
    path = script.with_name("starts")
    return path.read_text().split() if path.exists() else []


def words(script: Path, settings: str = "", seeds: int = 1) -> list[str]:
    """A command line that runs the fake script as algorithm `fake` into `results` beside it."""
    algorithm = f"fake={script}:{settings}" if settings else f"fake={script}"
    results = f"--results={script.parent / 'results'}"
    return ["--suite=smoke", "--evaluate=0", "--algorithms", algorithm, f"--seeds={seeds}", results]


def planned(script: Path, settings: str = "") -> worker.Work:
    """The one run of `words`, ready to be made."""
    suite = SUITES["smoke"]
    algorithms = dict([plan.parse_algorithm(words(script, settings)[3], suite)])
    (run,) = plan.make_plan(suite, algorithms, seeds=1)
    run_dir = script.parent / "results" / "smoke" / run.name
    return worker.Work(run, run_dir, plan.settings_of(run), {})


def refusal(capsys, given: list[str]) -> str:
    """The one line with which the launcher refuses a command line."""
    with pytest.raises(SystemExit) as refused:
        launcher.main(given)
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- The plan


def test_every_suite_is_accepted_by_its_scripts():
    for suite in SUITES.values():
        for run in plan.make_plan(suite, suite.algorithms, seeds=1):
            args = plan.script_args(run.script)(**plan.settings_of(run))  # which refuses what cannot work
            assert args.total_timesteps == run.total_timesteps


def test_atari57_is_57_games_that_envpool_has():
    assert len(set(ATARI57_GAMES)) == 57
    assert {task.env_id for task in SUITES["atari57"].tasks} <= set(envpool.list_all_envs())


def test_folders_are_deterministic_and_differ():
    suite = SUITES["control"]
    planned_runs = plan.make_plan(suite, suite.algorithms, seeds=2)
    assert planned_runs == plan.make_plan(suite, suite.algorithms, seeds=2)
    assert len({run.name for run in planned_runs}) == len(planned_runs) == 4 * 6 * 2
    sticky = next(run for run in planned_runs if run.name == "additive/CartPole-v1-sticky0.25/2")
    assert (sticky.env_id, sticky.flags) == ("CartPole-v1", {"sticky": 0.25, "loss_placement": "additive"})


def test_settings_are_typed_and_switches_are_understood(script):
    work = planned(script, "learning-rate=1,anneal=False")
    assert (work.settings["learning_rate"], work.settings["anneal"]) == (1.0, False)
    assert plan.flag_words(work.run.flags) == ["--learning-rate=1", "--no-anneal"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--suite=atari58"], ("--suite", "'atari58'", "atari57")),
        (["--suite=smoke", "--algorithms", "dqn"], ("--algorithms", "'dqn'", "deep_spi")),
        (["--suite=smoke", "--algorithms", "x=no_such.py"], ("--algorithms", "no_such.py")),
        (["--suite=smoke", "--algorithms", "x=README.md"], ("--algorithms", "*.py", "'README.md'")),
        (["--suite=smoke", "--algorithms", "x=deep_spi_ppo.py", "x=ppo_baseline.py", "--dry-run"], ("x=ppo", "twice")),
        (["--suite=smoke", "--tasks", "Pong", "--dry-run"], ("Pong", "CartPole-v1, or ENV_ID:STEPS")),
        (["--suite=smoke", "--tasks", "Pong-v5:4096", "--dry-run"], ("Pong-v5", "for Atari frames")),
        (["--suite=smoke", "--tasks", "NoSuch-v0:4096", "--dry-run"], ("NoSuch-v0", "no such environment")),
        (["--suite=smoke", "--tasks", "CartPole-v1:x", "--dry-run"], ("CartPole-v1:x", "STEPS")),
        (["--suite=smoke", "--tasks", "CartPole-v1:1", "--dry-run"], ("total-timesteps", "at least one rollout")),
        (["--suite=smoke", "--tasks", "CartPole-v1:9999:sticky", "--dry-run"], ("sticky", "FLAG=VALUE")),
        (["--suite=smoke", "--tasks", "CartPole-v1:9999:run_dir=/x", "--dry-run"], ("run_dir=/x", "VALUE")),
        (["--suite=smoke", "--tasks", "CartPole-v1", "CartPole-v1:9999", "--dry-run"], ("CartPole-v1", "twice")),
        (["--suite=smoke", "--algorithms", "a/b=deep_spi_ppo.py"], ("--algorithms", "letters")),
        (["--suite=smoke", "--algorithms", "x=deep_spi_ppo.py:gamma"], ("--algorithms", "FLAG=VALUE", "'gamma'")),
        (["--suite=smoke", "--algorithms", "x=deep_spi_ppo.py:clip=1"], ("--algorithms", "'clip'", "clip_coef")),
        (["--suite=smoke", "--algorithms", "x=deep_spi_ppo.py:seed=7"], ("--algorithms", "'seed'")),
        (["--suite=smoke", "--algorithms", "x=deep_spi_ppo.py:gamma=abc"], ("--algorithms", "--gamma=abc", "--help")),
        (["--suite=smoke", "--algorithms", "x=tests/launch.py"], ("--algorithms", "launch.py", "Args")),
        (["--suite=smoke", "--seeds=0"], ("--seeds", "0", "at least 1")),
        (["--suite=smoke", "--workers=0"], ("--workers", "0", "at least 1")),
        (["--suite=smoke", "--executor=slurm", "--time=4", "--dry-run"], ("--time", "4", "at least 5")),
        (["--suite=smoke", "--executor=pbs"], ("--executor", "'pbs'", "slurm")),
        (["--suite=smoke", "--gpus-per-task=-1"], ("--gpus-per-task", "-1", "at least 0")),
        (["--suite=smoke", "--evaluate=-1"], ("--evaluate", "-1", "at least 0")),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, flags, named):
    line = refusal(capsys, flags)
    assert all(part in line for part in named), line


def test_slurm_where_there_is_none_is_refused(capsys, monkeypatch, script):
    monkeypatch.setenv("PATH", "")
    line = refusal(capsys, [*words(script), "--executor=slurm"])
    assert "--executor" in line and "sbatch" in line and "local" in line
    assert launcher.main([*words(script), "--executor=slurm", "--dry-run"]) == 0


def test_dry_run_prints_plan_and_estimate_and_writes_nothing(capsys, script):
    results = script.parent / "results"
    flags = ["--suite=smoke", "--seeds=3", f"--results={results}", "--dry-run"]
    assert launcher.main([*flags, "--algorithms", "ppo", "deep_spi", f"fake={script}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ppo +CartPole-v1 +3 of 3 seeds to run +40,960 steps .*--reward-loss-coef=0.0", printed)
    # unknown are the fake script's, and ppo's, without a world model
    assert "9 runs, 0 finished, 9 to run\nestimate: unknown for 6 of 9 runs, whose speed was not measured" in printed
    assert not results.exists() and starts(script) == []


@pytest.mark.parametrize(
    ("machine", "flags", "side_by_side", "cores"),
    [
        (2, ["--workers=16"], 2, 1),  # no more than there are cores
        (64, ["--workers=16"], 3, 4),  # no more than there are runs
        (64, ["--workers=1"], 1, 64),  # of which the script uses one
        (64, ["--workers=2", "--cpus-per-task=3"], 2, 3),
        (2, ["--executor=slurm"], 3, 2),
        (2, ["--executor=slurm", "--array-parallelism=2", "--cpus-per-task=8"], 2, 8),
    ],
)
def test_estimate_is_for_the_cores_that_the_runs_can_use(
    capsys, monkeypatch, tmp_path, machine, flags, side_by_side, cores
):
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    words = ["--suite=smoke", "--seeds=3", f"--results={tmp_path}", "--dry-run"]
    assert launcher.main([*words, *flags]) == 0
    sps, _ = MEASURED_SPS["deep_spi_ppo.py"]
    seconds = round(3 * 40_960 / sps / side_by_side)  # of deep_spi's: those of ppo and additive are not measured
    expected = f"the others take 0:00:{seconds:02} (h:mm:ss), {side_by_side} at a time on {cores} cores each"
    assert expected in capsys.readouterr().out


def test_speed_is_known_with_default_settings_only():
    def cost(flags: dict, cores: int = 1) -> float | None:
        changed = replace(run, flags=flags)
        return launcher.estimated_seconds(changed, plan.settings_of(changed), cores)

    run = plan.make_plan(SUITES["smoke"], {"deep_spi": SUITES["smoke"].algorithms["deep_spi"]}, seeds=1)[0]
    seconds = pytest.approx(40_960 / MEASURED_SPS["deep_spi_ppo.py"][0])
    assert cost({}) == cost({}, cores=8) == cost({"sticky": 0.25}) == cost({"chunk_length": "8"}) == seconds
    for changed in ({"chunk_length": 1}, {"num_envs": 8}, {"loss_placement": "gated"}, {"reward_loss_coef": 0.0}):
        assert cost(changed) is cost(changed | {"sticky": 0.25}) is None


def test_plan_file_keeps_what_was_planned_earlier(script):
    work = planned(script)
    path = script.parent / "plan.json"
    plan.write_plan(path, [work.run])
    changed = plan.PlannedRun(**vars(work.run) | {"flags": {"seconds": 1}})
    other = plan.PlannedRun(**vars(work.run) | {"algorithm": "other"})
    plan.write_plan(path, [changed, other])
    assert [(run["algorithm"], run["flags"]) for run in json.loads(path.read_text())] == [
        ("fake", {"seconds": 1}),
        ("other", {}),
    ]


def test_two_launchers_can_plan_into_one_folder_at_a_time(script, monkeypatch):
    def write_slowly(path, content):
        time.sleep(0.3)  # after the file was read
        write_json(path, content)

    write_json, run, path = plan.write_json, planned(script).run, script.parent / "plan.json"
    monkeypatch.setattr(plan, "write_json", write_slowly)
    with ThreadPoolExecutor() as launchers:
        list(launchers.map(lambda seed: plan.write_plan(path, [replace(run, seed=seed)]), (1, 2)))
    assert sorted(run["seed"] for run in json.loads(path.read_text())) == [1, 2]


# ---- One run


def test_a_finished_run_is_measured_and_never_made_twice(script):
    work = planned(script)
    assert worker.find(work.run_dir, work.run, work.settings).state == "missing"
    worker.make_run(*work)
    done = json.loads((work.run_dir / "done.json").read_text())
    assert done == {"steps": STEPS, "minutes": pytest.approx(STEPS / 1000 / 60), "sps": 1000.0}
    worker.make_run(*work)
    assert starts(script) == ["1"]
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("fail", "code 1(.|\n)*the world model has melted"),
        ("short", f"after {STEPS // 2} of {STEPS} steps"),
        ("silent", "no charts/SPS"),
        ("weightless", "no agent.pt"),
    ],
)
def test_an_incomplete_run_is_an_error_and_not_done(script, behaviour, error):
    work = planned(script, f"behaviour={behaviour}")
    with pytest.raises(RuntimeError, match=error):
        worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings) == ("broken", "it has no done.json")


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (None, "it has no done.json"),
        ("", "not JSON"),
        ('{"steps": 7, "minutes": 1.0, "sps": 1.0}', f"short: 7 of {STEPS} steps"),
    ],
)
def test_a_broken_run_is_named_moved_aside_and_made_again(script, done, why):
    work = planned(script)
    worker.make_run(*work)
    (work.run_dir / "done.json").unlink()
    (work.run_dir / "remains").touch()
    if done is not None:
        (work.run_dir / "done.json").write_text(done)
    found = worker.find(work.run_dir, work.run, work.settings)
    assert found.state == "broken" and why in found.why
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"
    (aside,) = work.run_dir.parent.glob("1.broken-*")
    assert (aside / "remains").exists() and not (work.run_dir / "remains").exists()


def leave_checkpoint(run_dir: Path) -> None:
    """As a run that was interrupted does: a whole checkpoint, no weights, nothing to say it is done."""
    with zipfile.ZipFile(run_dir / "checkpoint.pt", "w") as checkpoint:
        checkpoint.writestr("state", "state")
    for name in ("agent.pt", "done.json"):
        (run_dir / name).unlink()


def test_a_run_that_was_told_to_stop_is_resumed_at_once(script):
    work = planned(script, "behaviour=stop")
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"
    assert starts(script) == ["1", "1"] and not list(work.run_dir.parent.glob("1.broken-*"))


def test_an_interrupted_run_is_resumed(script):
    work = planned(script)
    worker.make_run(*work)
    leave_checkpoint(work.run_dir)
    assert worker.find(work.run_dir, work.run, work.settings).state == "resumable"
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"
    assert not list(work.run_dir.parent.glob("1.broken-*")) and starts(script) == ["1", "1"]


def test_an_interrupted_run_of_another_text_of_the_script_is_made_again(script):
    work = planned(script)
    worker.make_run(*work)
    leave_checkpoint(work.run_dir)
    (work.run_dir / script.name).write_text(FAKE_SCRIPT + "# an older one\n")
    found = worker.find(work.run_dir, work.run, work.settings)
    assert found.state == "broken" and "has changed" in found.why
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"
    assert len(list(work.run_dir.parent.glob("1.broken-*"))) == 1


def test_a_refused_resume_leaves_the_checkpoint_where_it_is(script):
    """It may be this machine that lacks something, a GPU say; the next one goes on."""
    work = planned(script, "behaviour=refuse")
    worker.make_run(*work)
    leave_checkpoint(work.run_dir)
    with pytest.raises(RuntimeError, match="code 2"):
        worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "resumable"


def test_a_run_that_diverged_is_made_again_from_the_start(script):
    """Gone on with, in fresh environments, it might not diverge; a run that met a full disk goes on."""
    work = planned(script, "behaviour=diverge")
    with pytest.raises(RuntimeError, match="value_loss is not finite"):
        worker.make_run(*work)
    found = worker.find(work.run_dir, work.run, work.settings)
    assert found == ("broken", "it diverged: error: stopped at step 2048: losses/value_loss is not finite: nan")
    with pytest.raises(RuntimeError, match="value_loss is not finite"):
        worker.make_run(*work)
    assert len(list(work.run_dir.parent.glob("1.broken-*"))) == 1
    full = planned(script, "behaviour=full disk")
    shutil.rmtree(work.run_dir)
    with pytest.raises(RuntimeError, match="No space left"):
        worker.make_run(*full)
    assert worker.find(full.run_dir, full.run, full.settings).state == "resumable"


def damage(run_dir: Path) -> None:
    content = bytearray((run_dir / "checkpoint.pt").read_bytes())
    content[content.index(b"state", 30 + len("state"))] ^= 1  # in the content of its only part, after head and name
    (run_dir / "checkpoint.pt").write_bytes(content)


def cut(run_dir: Path) -> None:
    (run_dir / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes()[:-1])


def change_steps(run_dir: Path) -> None:
    """A script alone allows it; but the learning rate's schedule would not be that of the plan."""
    config = json.loads((run_dir / "config.json").read_text())
    config["args"]["total_timesteps"] //= 2
    (run_dir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("spoil", [damage, cut, change_steps])
def test_what_should_not_be_resumed_is_made_again(script, spoil):
    work = planned(script)
    worker.make_run(*work)
    leave_checkpoint(work.run_dir)
    assert worker.find(work.run_dir, work.run, work.settings).state == "resumable"
    spoil(work.run_dir)
    assert worker.find(work.run_dir, work.run, work.settings).state == "broken"
    worker.make_run(*work)
    assert len(list(work.run_dir.parent.glob("1.broken-*"))) == 1


def test_the_final_policy_plays_new_games_once(tmp_path, capsys):
    """Of a real script; a run that was finished without them plays them later, and is not made again."""
    algorithm = "mine=deep_spi_ppo.py:update_epochs=1"
    command = ["--suite=smoke", "--seeds=1", f"--results={tmp_path}", "--algorithms", algorithm]
    run_dir = tmp_path / "smoke" / "mine" / "CartPole-v1" / "1"
    assert launcher.main([*command, "--evaluate=0"]) == 0
    assert (run_dir / "done.json").exists() and not (run_dir / "evaluation.csv").exists()
    done = (run_dir / "done.json").read_bytes()
    for games in (3, 3, 5):
        assert launcher.main([*command, f"--evaluate={games}"]) == 0
        rows = (run_dir / "evaluation.csv").read_text().splitlines()[1:]
        assert len(rows) == games and all(row.startswith("sampled,") for row in rows)
    assert (run_dir / "done.json").read_bytes() == done
    assert worker.log_path(run_dir).read_text().count("evaluate.py") == 2
    assert "1 of 1 runs are finished" in capsys.readouterr().out


def read_rows(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


def test_policies_on_the_way_are_kept_and_play_and_go_on_where_they_were_stopped(tmp_path):
    """Of a real script, with ten iterations: the first nine."""
    command = ["--suite=smoke", "--seeds=1", f"--results={tmp_path}", "--evaluate=6"]
    command += ["--algorithms", "mine=deep_spi_ppo.py:update_epochs=1"]
    run_dir = tmp_path / "smoke" / "mine" / "CartPole-v1" / "1"
    assert launcher.main(command) == 0
    steps = [str(each * STEPS // 10) for each in range(1, 10)]
    kept = {path.stem: torch.load(path, weights_only=True) for path in run_dir.glob("policies/*.pt")}
    final = torch.load(run_dir / "agent.pt", weights_only=True)
    assert sorted(kept, key=int) == steps
    weights = [*(kept[step] for step in steps), final]
    assert all(any((a[name] != b[name]).any() for name in a) for a, b in itertools.pairwise(weights))
    rows = read_rows(run_dir / "policies.csv")
    assert [(row[0], row[1]) for row in rows] == [(step, "sampled") for step in steps for _ in range(2)]

    text = (run_dir / "policies.csv").read_text()
    stopped = [line for line in text.splitlines() if not line.startswith(f"{steps[3]},")]
    (run_dir / "policies.csv").write_text("\n".join([*stopped, f"{steps[3]},sampled,1.0,1,1"]) + "\n")  # one of two
    assert launcher.main(command) == 0
    assert (run_dir / "policies.csv").read_text() == text
    log = worker.log_path(run_dir).read_text()
    assert log.count("benchmark.launch.policies") == 2 and log.count("games of the policy") == 9 + 1

    torch.save(final, run_dir / "policies" / f"{STEPS}.pt")  # the same policy plays the same games as in evaluate.py
    policies.play(run_dir, games=6)
    assert [row[1:] for row in read_rows(run_dir / "policies.csv")[-6:]] == read_rows(run_dir / "evaluation.csv")


def test_policies_are_kept_at_tenths_of_the_run():
    def kept(iterations: int) -> list[int]:
        settings = {"num_envs": 4, "num_steps": 2, "total_timesteps": 8 * iterations + 5}
        interval, steps = policies.checkpoint_interval(settings), sorted(policies.kept_steps(settings))
        assert interval <= 100 and all(step % (8 * interval) == 0 for step in steps)
        return [step // 8 for step in steps]

    assert kept(24) == [2, 5, 7, 10, 12, 14, 17, 19, 22]
    assert kept(3) == [1, 2] and kept(1) == []
    assert kept(9765) == [1000, 2000, 2900, 3900, 4900, 5900, 6800, 7800, 8800]
    for iterations in range(10, 2000):
        own = kept(iterations)
        assert len(own) == 9
        assert all(abs(own[k - 1] - k * iterations / 10) <= max(0.5, iterations / 100) for k in range(1, 10))


def test_a_checkpoint_is_kept_if_it_is_due_and_of_the_known_form(tmp_path):
    keeper = policies.Keeper(tmp_path, {"num_envs": 4, "num_steps": 2, "total_timesteps": 8 * 20})
    path = tmp_path / "checkpoint.pt"
    keeper.look()  # there is none yet
    for iterations in range(1, 21):
        torch.save({"iterations": iterations, "agent": {"w": torch.tensor([iterations])}}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        keeper.look()
    found = {int(each.stem): torch.load(each, weights_only=True)["w"].item() for each in tmp_path.glob("policies/*")}
    assert found == {16 * each: 2 * each for each in range(1, 10)}
    for content in (b"", b"no checkpoint", path.read_bytes()[:-40]):
        path.write_bytes(content)
        keeper.look()
    torch.save({"weights": {}}, path)
    keeper.look()
    assert len(list(tmp_path.glob("policies/*"))) == 9


def test_a_script_without_checkpoints_is_not_asked_for_them(script):
    work = planned(script)
    worker.make_run(*work)
    assert "checkpoint-interval" not in worker.log_path(work.run_dir).read_text()


def test_a_run_that_cannot_be_evaluated_is_finished_all_the_same(script, capsys):
    """The fake script's weights are no weights."""
    assert launcher.main([*words(script), "--evaluate=2"]) == 0
    work = planned(script)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"
    captured = capsys.readouterr()
    assert "not evaluated: see" in captured.out + captured.err
    assert "evaluate.py ended with code 2" in worker.log_path(work.run_dir).read_text()


def test_what_older_scripts_wrote_is_still_a_finished_run(tmp_path):
    """With settings that are gone, at the value that scripts have now; and the machine's own choices."""
    run = plan.make_plan(SUITES["smoke"], {"deep_spi": SUITES["smoke"].algorithms["deep_spi"]}, seeds=1)[0]
    settings, gone = plan.settings_of(run), {"runs_dir": "", "run_name": "1", "resume": False, "device": "auto"}
    args = settings | gone | {"precision": "auto", "spectral_norm": "exact", "compile": False}
    for changed, state in (({}, "finished"), ({"spectral_norm": "published"}, "other")):
        (tmp_path / "config.json").write_text(json.dumps({"script": run.script, "args": args | changed}))
        (tmp_path / "done.json").write_text(json.dumps({"steps": plan.steps_of(settings)}))
        assert worker.find(tmp_path, run, settings).state == state


def test_device_and_precision_are_compared_only_where_the_plan_names_them():
    run = plan.make_plan(SUITES["smoke"], {"deep_spi": SUITES["smoke"].algorithms["deep_spi"]}, seeds=1)[0]
    for flags, said in (({}, ""), ({"precision": "fp32"}, "precision is 'fp32' and was 'bf16'")):
        named = replace(run, flags=flags)
        settings = plan.settings_of(named)
        config = {"script": run.script, "args": settings | {"device": "cuda", "precision": "bf16"}}
        assert worker.differences(named, settings, config) == said


# ---- Scripts that are not ours


def test_a_script_that_changes_its_settings_is_told_so_before_the_suite_is_paid_for(script, capsys):
    """Its run would be complete, and never the planned one. It is stopped at once, and so is the suite."""
    began = time.monotonic()
    assert launcher.main([*words(script, "behaviour=change,seconds=60", seeds=5), "--workers=1"]) == 1
    assert time.monotonic() - began < 40 and starts(script) == ["1"]
    said = capsys.readouterr().err
    assert "its settings are not the plan's: learning_rate is 0.1 and was 9.9" in said
    assert "killed" not in said and "no run of that script can be finished" in said


def test_a_path_is_a_setting_like_others(script):
    setting = '    run_dir: str = ""\n    data: pathlib.Path = pathlib.Path("a")\n'
    text = FAKE_SCRIPT.replace('    run_dir: str = ""\n', setting)
    script.write_text(text.replace("json.dumps({", "json.dumps(default=str, obj={"))
    for settings, data in (("", "a"), ("data=/some/where", "/some/where")):
        work = planned(script, settings)
        assert work.settings["data"] == data
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"


def test_a_module_beside_the_script_is_found_and_is_its_own(script, tmp_path):
    """Two scripts, each with a helper.py of its own beside it."""
    for name, rate in (("one", 0.25), ("two", 0.75)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "helper.py").write_text(f"RATE = {rate}\n")
        text = "from helper import RATE\n" + FAKE_SCRIPT.replace(
            "learning_rate: float = 0.1", "learning_rate: float = RATE"
        )
        (folder / "fake.py").write_text(text)
        shutil.copy(tmp_path / "whole", folder / "whole")
        assert planned(folder / "fake.py").settings["learning_rate"] == rate
    work = planned(tmp_path / "one" / "fake.py")
    worker.make_run(*work)
    assert worker.find(work.run_dir, work.run, work.settings).state == "finished"


def test_a_script_without_a_folder_to_set_is_refused(script, capsys):
    script.write_text(FAKE_SCRIPT.replace("run_dir: str", "my_dir: str"))
    assert "run_dir" in refusal(capsys, words(script))


def test_the_scripts_own_refusal_is_shown(script, capsys):
    check = """
    def __post_init__(self):
        if self.learning_rate < 0:
            print("error: --learning-rate: got -1.0; must be at least 0", file=sys.stderr)
            sys.exit(2)

if __name__ == "__main__":"""
    script.write_text(FAKE_SCRIPT.replace('if __name__ == "__main__":', check, 1))
    line = refusal(capsys, words(script, "learning_rate=-1"))
    assert "--learning-rate: got -1.0; must be at least 0" in line


def test_a_slash_in_an_environments_name_is_no_folder():
    task = replace(SUITES["smoke"].tasks[0], env_id="ALE/Pong-v5")
    (run,) = plan.make_plan(replace(SUITES["smoke"], tasks=[task]), {"ppo": SUITES["smoke"].algorithms["ppo"]}, seeds=1)
    assert (run.name, run.env_id) == ("ppo/ALE-Pong-v5/1", "ALE/Pong-v5")


def test_the_plan_is_printed_in_any_locale(script):
    """A Greek letter in an algorithm's folder, and nothing but ASCII in the locale."""
    folder = script.parent / "α"
    folder.mkdir()
    shutil.copy(script, folder / "fake.py")
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "benchmark.run", *words(folder / "fake.py"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ascii_only, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "α/fake.py" in done.stdout.decode()


def test_a_finished_run_with_other_settings_is_refused(capsys, script):
    work = planned(script)
    worker.make_run(*work)
    for settings, change in (
        ("learning_rate=0.2", "learning_rate is 0.2 and was 0.1"),  # another flag in the plan
        ("anneal=False", "anneal is False and was True"),
    ):
        line = refusal(capsys, words(script, settings))
        assert "--results" in line and str(work.run_dir) in line and change in line
    script.write_text(FAKE_SCRIPT.replace("learning_rate: float = 0.1", "learning_rate: float = 0.3"))
    plan.script_args.cache_clear(), plan.parse_flags.cache_clear()
    line = refusal(capsys, words(script))  # the script has another default now
    assert "learning_rate is 0.3 and was 0.1" in line
    with pytest.raises(RuntimeError, match="other settings"):
        worker.make_run(*planned(script))
    assert starts(script) == ["1"]


def test_environment_of_a_run(script, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    show = "import os; print({n: os.environ.get(n) for n in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')})\n"
    script.write_text(FAKE_SCRIPT + f"    {show}")
    work = planned(script)
    worker.make_run(*work[:3], {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": None})
    log = worker.log_path(work.run_dir).read_text()
    assert "{'OMP_NUM_THREADS': '3', 'CUDA_VISIBLE_DEVICES': None}" in log


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a script outlives its worker, and is waited for")
def test_a_killed_worker_takes_its_script_along_and_frees_the_run(script):
    work = planned(script, "seconds=60")
    assert not worker.is_being_made(work.run_dir)
    process = multiprocessing.get_context("spawn").Process(target=worker.make_run, args=work)
    process.start()
    deadline = time.monotonic() + 30
    while not starts(script) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert starts(script) == ["1"] and worker.is_being_made(work.run_dir)
    process.kill()
    process.join()
    while worker.is_being_made(work.run_dir) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not worker.is_being_made(work.run_dir)
    assert worker.find(work.run_dir, work.run, work.settings).state == "broken"


# ---- All runs


@pytest.mark.parametrize(("flags", "threads"), [(["--workers=2"], "8"), (["--workers=2", "--cpus-per-task=3"], "3")])
def test_workers_divide_the_cores_unless_told_how_many(script, monkeypatch, flags, threads):
    made = []
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(launcher, "work_locally", lambda todo, *_: made.extend(todo) or iter(()))
    launcher.main([*words(script), *flags])
    assert [work.environment["OMP_NUM_THREADS"] for work in made] == [threads]


def test_local_runs_to_the_end_names_what_failed_and_continues(script):
    command = [sys.executable, "-m", "benchmark.run", "--workers=2", *words(script, "behaviour=fail,bad_seed=2", 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "FAILED fake/CartPole-v1/2" in done.stderr and "the world model has melted" in done.stderr
    assert "1 of 2 runs are finished" in done.stdout and "2/2" in done.stderr  # the bar counts runs
    assert sorted(starts(script)) == ["1", "2"]
    written = json.loads((script.parent / "results" / "smoke" / "plan.json").read_text())
    assert [(run["label"], run["seed"]) for run in written] == [("CartPole-v1", 1), ("CartPole-v1", 2)]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "fake/CartPole-v1/2 is broken, will be moved aside" in again.stdout
    assert sorted(starts(script)) == ["1", "2", "2"]


def processes_of(session: int) -> list[int]:
    """Ids of all living processes of a session."""
    living = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    living.append(int(entry.name))
            except ProcessLookupError:  # it ended since the folder was listed
                continue
    return living


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_kill_at_random_then_continue(script):
    chance, seeds, rounds = random.Random(0), 16, 10
    command = [sys.executable, "-m", "benchmark.run", "--workers=2", *words(script, "seconds=2", seeds)]
    tasks = script.parent / "results" / "smoke" / "fake" / "CartPole-v1"
    killed = {"launchers": 0, "workers": 0}

    def kill(pid: int, kind: str) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
            killed[kind] += 1
        except ProcessLookupError:  # its parent's death took it along, or it ended by itself
            return

    for _ in range(rounds):
        started, deadline = len(starts(script)), time.monotonic() + 60
        launcher_process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        session = launcher_process.pid
        while len(starts(script)) == started and time.monotonic() < deadline:
            time.sleep(0.05)  # until the launcher has a run on its way
        time.sleep(chance.uniform(0, 2))
        for pid in processes_of(session):  # submitit's, the workers' and the scripts'
            if pid != session and chance.random() < 0.4:
                kill(pid, "workers")
        time.sleep(chance.choice((0, 1)))  # the launcher dies with its workers, or meets their death first
        kill(session, "launchers")
        launcher_process.wait(timeout=10)  # what it leaves goes on, and the next launcher meets it
    assert killed["launchers"] == rounds and killed["workers"] >= rounds
    assert len(list(tasks.glob("*/done.json"))) < seeds  # or the last rounds would have had nothing to kill

    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert sorted(path.parent.name for path in tasks.glob("*/done.json")) == sorted(map(str, range(1, seeds + 1)))
    assert not (script.parent / "two at a time").exists()
    started, broken = starts(script), list(tasks.glob("*.broken-*"))
    # Each start left a finished or a broken folder, so no finished run was lost.
    assert seeds < len(started) <= seeds + len(broken)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and f"{seeds} of {seeds} runs are finished" in again.stdout
    assert starts(script) == started


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_interrupting_the_launcher_ends_its_runs_and_keeps_the_finished(script):
    command = [sys.executable, "-m", "benchmark.run", *words(script, "seconds=60")]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not starts(script) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues" in err
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert starts(script) == ["1"] and processes_of(process.pid) == []


# Own tasks


def test_tasks_of_the_command_line_are_what_they_say():
    suite = SUITES["control"]
    own = plan.parse_task("Acrobot-v1:100000:sticky=0.25,gamma=0.9", suite)
    assert (own.env_id, own.total_timesteps, own.label) == ("Acrobot-v1", 100_000, "Acrobot-v1-sticky0.25-gamma0.9")
    assert plan.parse_task("CartPole-v1-sticky0.25", suite) is suite.tasks[1]
    runs = plan.make_plan(replace(suite, tasks=[own]), {"ppo": suite.algorithms["ppo"]}, 1)
    settings = plan.settings_of(runs[0])
    assert settings["env_id"] == "Acrobot-v1" and settings["sticky"] == 0.25 and settings["gamma"] == 0.9
    assert settings["reward_loss_coef"] == 0 and settings["total_timesteps"] == 100_000
