"""The plain form is the fast form but for rounding; and what the table of speeds says is what was measured."""

import csv
import json
import statistics
import subprocess
import sys

import pytest
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import deep_spi_ppo_atari
import ppo_baseline
import spr_ppo_atari
from benchmark.peers import plain
from benchmark.studies import throughput


@pytest.mark.parametrize("script", [ppo_baseline, deep_spi_ppo_atari])
def test_plain_form_trains_to_the_same_weights(script, monkeypatch, tmp_path):
    """One iteration, 16 updates, on Pong. Rounding differs, and Adam takes full steps where a gradient is rounding."""
    small = "--num-envs 4 --num-steps 8 --total-timesteps 32 --chunk-length 1 --device cpu --seed 3 --precision fp32"

    def weights(name):
        flags = [*small.split(), "--run-dir", str(tmp_path / name)]
        script.train(tyro.cli(script.Args, args=flags))
        return torch.load(tmp_path / name / "agent.pt", weights_only=True)

    torch.manual_seed(3)
    start = dict(script.Agent(6).state_dict())
    fast = weights("fast")
    monkeypatch.setattr(script, "Agent", script.Agent)  # so that both are put back after the test
    monkeypatch.setattr(deep_spi_ppo_atari, "TransitionModel", deep_spi_ppo_atari.TransitionModel)
    monkeypatch.setattr(script, "ctypes", script.ctypes)
    plain.make_plain(script)
    same = weights("plain")
    assert fast.keys() == same.keys()
    for name in ("encoder.0.weight", "encoder.4.weight", "fc.weight", "actor.weight", "critic.weight"):
        moved = (fast[name] - start[name]).norm()
        assert (fast[name] - same[name]).norm() < 0.02 * moved, name


def test_frozen_games_are_like_the_real_ones():
    args = ppo_baseline.Args(num_envs=4, device="cpu")
    real, frozen = ppo_baseline.Games(args), throughput.FrozenGames(args)
    assert real.num_actions == frozen.num_actions
    first, last = real.reset(), frozen.reset()
    assert (first.shape, first.dtype, first.stride()) == (last.shape, last.dtype, last.stride())
    *ours, ended = frozen.step(torch.zeros(4, dtype=torch.int64))
    *theirs, _ = real.step(torch.zeros(4, dtype=torch.int64))
    assert ended == {} and len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.shape, our.dtype) == (their.shape, their.dtype)


def test_ratios_are_of_cases_that_are_measured():
    measured = {*throughput.cases(), "stable_baselines3 A=6", *(f"stages A={a}" for a in throughput.GAMES)}
    for above, below in throughput.RATIOS.values():
        assert {above[0], below[0]} <= measured


def test_tables_of_two_rounds(tmp_path):
    """Ratios are taken round by round: 2 and 4, so 3; not 30/10.5."""
    values = {("ppo_baseline A=6", "sps"): (20, 40), ("stable_baselines3 A=6", "sps"): (10, 10)}
    values |= {("ppo_baseline A=6", "peak_memory_gb"): (1, 1.5), ("ppo_baseline A=6", "overhead_s"): (8, 8)}
    work = throughput.iteration_flops("ppo_baseline", 6)
    values |= {("stages A=6", "matrix_flops_per_s"): (work / 20, work / 20)}
    values |= {("stages A=6", "environment_sps"): (1024, 1024)}
    values |= {("stable_baselines3 A=6", name): (1, 1) for name in ("peak_memory_gb", "overhead_s")}
    with open(tmp_path / "throughput.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("round", "case", "measure", "value"))
        table.writerows((i + 1, *key, pair[i]) for key, pair in values.items() for i in (0, 1))
    ratios = throughput.ratio_table(tmp_path)
    assert "Stable-Baselines3's PPO (float32), A = 6 | 3.00 | 2.00 to 4.00 | 2 |" in ratios
    assert "A = 4" not in ratios  # which no case had
    # (20 + 1 seconds) at best, 1024 / 30 seconds measured
    assert f"| ppo_baseline A=6 | 30 | 1.25 | 8.0 | {work / 1e9:.0f} | 62 % |" in throughput.speed_table(tmp_path)


@pytest.mark.parametrize("folder", ["", "throughput_amx"])
def test_parts_of_an_iteration_sum_to_the_whole(folder):
    values = throughput.values_by_case(throughput.RESULTS / folder)
    drawn = 0
    for script in ("ppo_baseline", "deep_spi_ppo_atari"):
        for num_actions in (4, 6, 18):
            if rates := values[f"{script} A={num_actions}", "sps"]:
                parts = throughput.iteration_parts(values, script, num_actions)
                assert min(parts.values()) > 0 and parts.keys() <= throughput.STAGES.keys()
                assert sum(parts.values()) == pytest.approx(1024 / statistics.median(rates))
                drawn += 1
    assert drawn >= 4


def test_operations_are_those_of_the_scripts():
    """torch counts the same for the baseline, and for Deep SPI some more: σ, kernels picked, patches moved."""

    def counted(script, world_model, *others):
        agent, args = script.Agent(6), script.Args(device="cpu")
        fields = {"actions": torch.arange(256) % 6, "old_log_probs": torch.zeros(256, 6), "mask": torch.ones(256)}
        fields |= dict.fromkeys(("rewards", "advantages", "returns"), torch.zeros(256))
        fields["obs"] = torch.zeros((32, 8 + world_model, 84, 84, 4), dtype=torch.uint8)
        batch = script.Transitions(*(fields[name] for name in script.Transitions._fields))
        noise = (torch.zeros(256, *agent.transition_model.noise_shape),) if world_model and not others else others
        with FlopCounterMode(display=False) as update:
            script.compute_loss(agent, batch, args, *noise)[0].backward()
        with FlopCounterMode(display=False) as rollout, torch.no_grad():
            agent.policy_and_value(agent.encode(fields["obs"].flatten(0, 1)[:128]))
        return 16 * update.get_total_flops() + 9 * rollout.get_total_flops()

    work = {script: throughput.iteration_flops(script, 6) for script in throughput.COUNTED}
    assert work["ppo_baseline"] == pytest.approx(counted(ppo_baseline, False), rel=0.01)
    assert 1 < counted(deep_spi_ppo_atari, True) / work["deep_spi_ppo_atari"] < 1.2
    target = spr_ppo_atari.Agent(6).requires_grad_(False)
    spr = counted(spr_ppo_atari, True, torch.Generator().manual_seed(0), target)
    assert work["spr_ppo_atari"] == pytest.approx(spr, rel=0.01)


@pytest.mark.slow
def test_one_case_from_start_to_end():
    # In a process of its own, as this one may be larger than the case, whose peak memory could then not be told.
    code = "from benchmark.studies.throughput import *; "
    code += "print(json.dumps(run(Case(('ppo_baseline.py', '--num-envs', '128', '--num-steps', '8'), 6, 1))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=throughput.ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert 10 < result["sps"] < 1e5 and 0 < result["overhead_s"] < 200 and 0.3 < result["peak_memory_gb"] < 5
    with pytest.raises(RuntimeError, match="at least 1"):
        throughput.run(throughput.Case(("ppo_baseline.py", "--num-envs", "0"), 6, 1))
