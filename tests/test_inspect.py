"""inspect_world_model.py: each of its numbers against a plain loop; what it refuses; its page in a browser."""

import base64
import csv
import dataclasses
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import dbc_ppo_atari
import deep_spi_ppo
import deep_spi_ppo_atari
import deep_spi_ppo_continuous
import deepmdp_ppo_atari
import dream_spi
import evaluate
import inspect_world_model as inspected
import ppo_baseline
import spr_ppo_atari

ROOT = Path(__file__).parent.parent
SMALL = {"num_envs": 4, "num_steps": 8, "total_timesteps": 64, "chunk_length": 8, "num_minibatches": 2}
SMALL |= {"device": "cpu", "precision": "fp32", "seed": 3}
ATARI = (deep_spi_ppo_atari, deepmdp_ppo_atari, spr_ppo_atari, dbc_ppo_atari)
VECTORS = (deep_spi_ppo, deep_spi_ppo_continuous, dream_spi)
SCRIPTS = pytest.mark.parametrize("script", [*VECTORS, *ATARI], ids=lambda script: script.__name__)
WITH_REWARD = pytest.mark.parametrize(
    "script", [*VECTORS, deep_spi_ppo_atari, deepmdp_ppo_atari, dbc_ppo_atari], ids=lambda script: script.__name__
)


@torch.enable_grad()  # also within a test that needs none
def trained(script, run_dir: Path, **settings) -> Path:
    """The folder of a short run."""
    known = {field.name for field in dataclasses.fields(script.Args)}
    script.train(script.Args(run_dir=str(run_dir), **{k: v for k, v in (SMALL | settings).items() if k in known}))
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs, made when they are asked for."""
    made = {}

    def of(script) -> Path:
        if script not in made:
            env_id = {"deep_spi_ppo_continuous": "Pendulum-v1"}.get(script.__name__, "CartPole-v1")
            env_id = "Pong-v5" if hasattr(script, "ATARI") else env_id
            total = 32 if env_id == "Pong-v5" else 640
            run_dir = tmp_path_factory.mktemp(script.__name__) / "run"
            made[script] = trained(script, run_dir, env_id=env_id, total_timesteps=total)
        return made[script]

    return of


def parts_of(run_dir: Path, games: int = 3, seed: int = 5) -> tuple:
    """The run's model and settings, as main has them."""
    config, state = evaluate.load_config(run_dir), evaluate.load_state(run_dir)
    script = evaluate.script_of(run_dir, config, None)
    args = evaluate.settings_of(script, config, seed, games)
    agent = evaluate.make_agent(script, args, script.Games(args), state["agent"])
    return inspected.Model(script, agent, args, state), args


@pytest.fixture(scope="module")
def plays(runs):
    """Model, settings and a play of short runs: on vectors with several episodes, on Atari of a few steps."""
    made = {}

    def of(script) -> tuple:
        if script not in made:
            model, args = parts_of(runs(script), games=2 if script in ATARI else 4)
            made[script] = model, args, inspected.record(model, args, 18 if script in ATARI else 120)
        return made[script]

    return of


def some_rows(play, count: int = 12) -> list[tuple[int, int]]:
    """Real rows (t, i), with those at an episode's end among them."""
    real = [(t, i) for t, i in np.argwhere(play.mask.numpy()).tolist()]
    ends = [(t, i) for t, i in real if t + 1 < len(play.mask) and not play.mask[t + 1, i]]
    return real[:: max(1, len(real) // count)] + ends[:4]


def smooth_l1(x, y) -> float:
    """The mean over the numbers, one by one."""
    errors = [abs(float(a) - float(b)) for a, b in zip(x.flatten(), y.flatten(), strict=True)]
    return sum(0.5 * e * e if e < 1 else e - 0.5 for e in errors) / len(errors)


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- Playing


@SCRIPTS
@torch.no_grad()
def test_a_play_is_what_the_simulator_says(script, plays):
    """The same games again, with the actions that were taken."""
    model, args, play = plays(script)
    games = model.script.Games(args)
    obs, is_dummy, resets = games.reset(), np.zeros(args.num_envs, dtype=bool), 0
    for t, actions in enumerate(play.actions):
        assert torch.allclose(model.agent.encode(obs), play.z[t], atol=1e-5)
        if obs.dtype == torch.uint8:
            assert np.array_equal(play.pictures[t], obs[..., 3])
        assert play.mask[t].tolist() == (~is_dummy).tolist()
        resets += is_dummy.sum()
        obs, rewards, _, is_last, _ = games.step(actions)
        if script in ATARI:
            assert torch.equal(play.rewards[t].double(), rewards.double())
        is_dummy = is_last.numpy().copy()
    assert torch.allclose(model.agent.encode(obs), play.z[-1], atol=1e-5)
    if script in (deep_spi_ppo, dream_spi):
        assert resets > 4  # or the tests of the mask would show nothing


@pytest.mark.parametrize("script", VECTORS, ids=lambda script: script.__name__)
def test_rewards_are_as_the_model_was_taught_them(script, runs, plays):
    """Over the deviation that the checkpoint has, clipped; and asking changes nothing."""
    model, args, _ = plays(script)
    count, total, squares = torch.load(runs(script) / "checkpoint.pt", weights_only=True)["reward_scaler"]["sums"]
    std = math.sqrt(squares / count - (total / count) ** 2)
    raw = torch.tensor([[0.5, -3.0], [1e4, -1e4]])
    for _ in range(2):
        scaled = model.scaled(torch.nn.functional.pad(raw, (0, args.num_envs - 2)))[:, :2]
        assert scaled.tolist() == [[pytest.approx(0.5 / std), pytest.approx(max(-3 / std, -10))], [10, -10]]


def test_tilt_keeps_the_bound_and_reaches_it():
    rng = np.random.default_rng(0)
    for bound in (1.1, 1.5, 3.0):
        logits = torch.tensor(rng.normal(size=(3000, 6)) * rng.choice([0.1, 3, 30, 300], size=(3000, 1)))
        probs, is_up = logits.softmax(-1), torch.tensor(rng.random((3000, 6)) < 0.5)
        ratios = inspected.tilt(probs, is_up, bound)
        assert ratios.min() >= max(1 / bound, 2 - bound) - 1e-12 and ratios.max() <= bound + 1e-12
        assert torch.allclose((probs * ratios).sum(-1), torch.ones(3000, dtype=torch.float64), atol=1e-12)
        up_mass = (probs * is_up).sum(-1)
        is_mixed = (up_mass > 1e-6) & (up_mass < 1 - 1e-6)
        assert is_mixed.sum() > 1000
        for p, up, row in zip(probs[is_mixed], is_up[is_mixed], ratios[is_mixed], strict=True):
            # More for the upper ones would break a bound: one is reached.
            assert row[up].max() == pytest.approx(bound) or row[~up].min() == pytest.approx(1 / bound)
            assert (row[up] >= 1).all() and (row[~up] <= 1).all() and len(p) == 6
        for all_alike in (torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)):
            assert inspected.tilt(probs[:1], all_alike, bound).allclose(torch.ones(1, 6, dtype=torch.float64))


@SCRIPTS
def test_perturbed_policies_keep_the_bound(script, plays):
    model, args, own = plays(script)
    assert (own.ratios == 1).all() and (own.moved == 0).all()
    for bound in inspected.BOUNDS:
        play = inspected.record(model, args, 6, bound, own.z[:-1][own.mask].mean(0))
        assert play.ratios.min() >= 1 / bound - 1e-12 and play.ratios.max() <= bound + 1e-12
        assert play.moved.max() > 0.01 * (bound - 1)
        at_bound = (play.ratios - bound).abs().amin() < 1e-9 or (play.ratios - 1 / bound).abs().amin() < 1e-9
        assert at_bound


def test_discrete_actions_are_drawn_from_the_tilted_policy():
    torch.manual_seed(0)
    probs, push = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-1.0, 2.0, -3.0])
    actions, before, ratios = inspected.act(probs.log().expand(40_000, 3), push.expand(40_000, 3), 1.5)
    expected = torch.tensor([0.5 * 0.55 / 0.7, 0.45, 0.2 * 0.55 / 0.7])  # action 1 is 1.5 times as probable
    assert torch.allclose((before * ratios)[0].float(), expected, atol=1e-6)
    assert torch.allclose(actions.bincount() / 40_000, expected, atol=0.012)  # 5 standard errors


def test_continuous_actions_are_drawn_from_the_tilted_policy():
    """The half-space of probability ½ has 5/6 at C = 3; in each half the density's shape is the normal's."""
    torch.manual_seed(0)
    mean, log_std, push = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    actions, _, ratios = inspected.act((mean.expand(40_000, 2), log_std), push.expand(40_000, 2), 3.0)
    assert torch.allclose(ratios[0], torch.tensor([5 / 3, 1 / 3], dtype=torch.float64))
    along = ((actions - mean) / log_std.exp()) @ push / 2**0.5
    assert abs((along > 0).float().mean() - 5 / 6) < 0.01
    for half in (along[along > 0], -along[along < 0]):
        assert abs(half.mean() - math.sqrt(2 / math.pi)) < 0.04 and abs(half.square().mean() - 1) < 0.09


def test_a_perturbed_policy_is_a_function_of_the_state(plays, monkeypatch):
    """v is drawn once a play: the push of an action has the sign of one linear function of z in all steps of a game."""
    model, args, own = plays(deep_spi_ppo)
    pushes, drawn, act, randn = [], [], inspected.act, torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape: drawn.append(randn(*shape)) or drawn[-1])
    monkeypatch.setattr(inspected, "act", lambda *given: pushes.append(given[1]) or act(*given))
    centre = own.z[:-1][own.mask].mean(0)
    play = inspected.record(model, args, 30, 1.5, centre)
    assert len(drawn) == 1
    for t, push in enumerate(pushes):
        for i in range(args.num_envs):
            for a in range(2):
                by_hand = sum(v * (z - c) for v, z, c in zip(drawn[0][i, a], play.z[t, i], centre, strict=True))
                assert push[i, a] == pytest.approx(float(by_hand), abs=1e-4)


def test_bars_show_the_observation():
    obs = torch.tensor([[[0.0, 5.0, 1.0]], [[1.0, 5.0, 0.0]], [[0.5, 5.0, 0.0]]])
    pictures = inspected.bars(obs)
    assert pictures.shape == (3, 1, 48, 96) and set(np.unique(pictures)) == {0, 200}
    heights = (pictures[:, 0, :, ::32] == 200).sum(1)
    assert heights.tolist() == [[1, 1, 48], [48, 1, 1], [25, 1, 1]]
    assert (pictures[0, 0, 0, 64:] == 200).all() and (pictures[0, 0, -1] == 200).all()  # they stand on the ground


# ---- Numbers


@SCRIPTS
@torch.no_grad()
def test_losses_against_a_plain_loop(script, plays):
    model, _, play = plays(script)
    found = inspected.losses(model, play)
    agent, P = model.agent, model.agent.transition_model
    for t, i in some_rows(play):
        z, a, next_z = play.z[t, i][None], play.actions[t, i][None], play.z[t + 1, i][None]
        if script in (deep_spi_ppo, deep_spi_ppo_continuous, deep_spi_ppo_atari):
            predicted = P(z, a, torch.zeros(1, *P.noise_shape))
        elif script is dream_spi:
            predicted = P(z, a, torch.zeros_like(z))
        else:
            predicted = P(z, a)[0][None] if script is not dbc_ppo_atari else P(z, a)[0]
            predicted = predicted.view_as(z)
        near = {"rel": 1e-3, "abs": 1e-7}
        assert found["transition_loss"][t, i] == pytest.approx(smooth_l1(predicted, next_z), **near)
        assert found["transition_loss_copy"][t, i] == pytest.approx(smooth_l1(z, next_z), **near)
        if script is spr_ppo_atari:
            assert "reward_loss" not in found and "predicted_reward" not in found
            continue
        reward = agent.reward_decoder(predicted) if script is dbc_ppo_atari else agent.reward_model(z, a)
        error, r = float(reward) - float(play.rewards[t, i]), float(play.rewards[t, i])
        pays = (lambda e: e * e) if script is dbc_ppo_atari else (lambda e: 0.5 * e * e if abs(e) < 1 else abs(e) - 0.5)
        assert found["predicted_reward"][t, i] == pytest.approx(float(reward), rel=1e-3, abs=1e-5)
        assert found["reward_loss"][t, i] == pytest.approx(pays(error), rel=1e-2, abs=1e-5)
        assert found["reward_loss_zero"][t, i] == pytest.approx(pays(r), **near)


@pytest.mark.parametrize(
    ("script", "numbers"),
    [(deep_spi_ppo, 32), (deep_spi_ppo_continuous, 64), (deep_spi_ppo_atari, 3136), (deepmdp_ppo_atari, 1)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_distance_is_the_scripts_transition_loss_per_number(script, numbers, plays):
    _, _, play = plays(script)
    x, y = play.z[3] * 2 + 0.5, play.z[4]
    assert torch.allclose(inspected.distance(x, y), script.transition_loss(x, y) / numbers, rtol=1e-5)


def test_distance_is_dreamspis_transition_loss_over_its_classes(plays):
    _, _, play = plays(dream_spi)
    loss = dream_spi.transition_loss(play.z[3], play.z[60]) / dream_spi.NUM_CLASSES
    assert loss.max() > 0 and torch.allclose(inspected.distance(play.z[3], play.z[60]), loss, rtol=1e-5, atol=1e-7)


@SCRIPTS
@torch.no_grad()
def test_a_sample_has_the_noise_of_training(script, plays):
    model, _, play = plays(script)
    z, a = play.z[2], play.actions[2]
    P = model.agent.transition_model
    torch.manual_seed(0)
    sample = model.next_z(z, a, is_sampled=True)
    torch.manual_seed(0)
    if script is dream_spi:
        expected = P(z, a, dream_spi.gumbel(*z.shape))
    elif hasattr(P, "noise_shape"):
        expected = P(z, a, torch.randn(len(z), *P.noise_shape).clamp(-1, 1))
    elif script is dbc_ppo_atari:
        mean, std = P(z, a)
        expected = mean + std * torch.randn_like(mean)
    else:
        expected = P(z, a)
    assert torch.equal(sample, expected)
    is_noisy = script not in (deepmdp_ppo_atari, spr_ppo_atari)
    assert torch.equal(sample, model.next_z(z, a)) != is_noisy


def test_interval_against_a_plain_loop():
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(20, 6)), rng.random((20, 6)) < 0.7
    mean, low, high = inspected.interval(np.where(mask, x, 1e9), mask, seed=4)
    assert mean == pytest.approx(np.mean([x[t, i] for t in range(20) for i in range(6) if mask[t, i]]))
    means = []
    for games in np.random.default_rng(4).integers(6, size=(2_000, 6)):
        rows = [x[t, i] for i in games for t in range(20) if mask[t, i]]
        means.append(sum(rows) / len(rows))
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert np.isnan(inspected.interval(x, np.zeros_like(mask), 0)).all()
    assert inspected.interval(np.full((20, 6), 0.25), mask, 0) == (0.25, 0.25, 0.25)


def test_interval_covers_the_mean_of_games_that_differ():
    """Rows of a game are alike: an interval over rows would cover it rarely. 40 games, nominal 95 %."""
    rng, hits, naive = np.random.default_rng(2), 0, 0
    for trial in range(300):
        x = rng.normal(size=(1, 40)) + 0.1 * rng.normal(size=(50, 40))
        _, low, high = inspected.interval(x, np.ones(x.shape, dtype=bool), trial)
        hits += low <= 0 <= high
        naive += abs(x.mean()) <= 1.96 * x.std() / math.sqrt(x.size)
    assert 0.88 <= hits / 300 <= 0.99 and naive / 300 < 0.5


@pytest.mark.parametrize("script", [deep_spi_ppo, dream_spi, deepmdp_ppo_atari], ids=lambda script: script.__name__)
@torch.no_grad()
def test_unrolled_chains_against_a_plain_loop(script, plays):
    model, _, play = plays(script)
    steps, errors, counts, chain = inspected.unroll(model, play)
    real = [play.z[t, i] for t, i in np.argwhere(play.mask.numpy()).tolist()]
    mean = sum(real) / len(real)
    assert steps.tolist() == list(range(0, len(play.rewards) - 14, 15))
    lengths = set()
    for s, start in enumerate(steps.tolist()):
        for i in range(play.mask.shape[1])[:: 2 if script is deepmdp_ppo_atari else 1]:
            z, length = play.z[start, i], 0
            for k in range(1, 16):
                if not play.mask[start + k - 1, i]:
                    break
                z = model.next_z(z[None], play.actions[start + k - 1, i][None])[0]
                true, length = play.z[start + k, i], k
                expected = [smooth_l1(x, true) for x in (z, play.z[start, i], mean)] if k in (1, 4, 15) else None
                if expected:
                    assert errors[k - 1, :, s, i].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-7)
                assert torch.allclose(chain[k].unflatten(0, counts.shape[1:])[s, i], z, atol=1e-4)
            assert counts[:, s, i].tolist() == [k <= length for k in range(1, 16)]
            lengths.add(length)
    assert 15 in lengths and (script in ATARI or len(lengths) > 2)


def test_nearest_is_a_real_frame_of_another_game(plays):
    _, _, play = plays(deep_spi_ppo)
    for t, i in some_rows(play, 8):
        z = play.z[t, i] + 0.01
        best = min(
            (smooth_l1(play.z[u, j], z), u, j)
            for u in range(len(play.mask))
            for j in range(play.mask.shape[1])
            if play.mask[u, j] and j != i
        )
        step, game, d = inspected.nearest(play, z, i)
        assert game != i and play.mask[step, game] and d == pytest.approx(best[0], rel=1e-4)


def test_reward_bins_share_out_every_reward():
    rng = np.random.default_rng(0)
    for rewards in (rng.choice([-1.0, 0.0, 1.0], size=400), rng.normal(size=400), np.zeros(5), np.arange(13.0)):
        bins = inspected.reward_bins(rewards)
        assert (sum(members.astype(int) for _, members in bins) == 1).all()
        assert all(members.any() for _, members in bins)
        if len(np.unique(rewards)) <= 12:
            assert [float(name) for name, _ in bins] == sorted(set(rewards))
        else:
            for name, members in bins:
                low, high = map(float, name.split(" to "))
                assert low - 0.01 <= rewards[members].min() and rewards[members].max() <= high + 0.01


def test_pairs_against_a_plain_loop(plays):
    _, _, play = plays(deep_spi_ppo)
    d, absolute, difference = inspected.value_pairs(play, seed=3)
    assert len(d) == len(absolute) == len(difference) == inspected.NUM_PAIRS
    real = np.argwhere(play.mask.numpy()).tolist()
    rng = np.random.default_rng(3)
    first = rng.integers(len(real), size=inspected.NUM_PAIRS)
    offset = rng.integers(1, len(real), size=inspected.NUM_PAIRS)
    for n in range(0, inspected.NUM_PAIRS, 100):
        one, two = real[first[n]], real[(first[n] + offset[n]) % len(real)]
        assert one != two
        assert d[n] == pytest.approx(smooth_l1(play.z[*one], play.z[*two]), rel=1e-3, abs=1e-9)
        by_hand = sum(abs(float(x) - float(y)) for x, y in zip(play.z[*one], play.z[*two], strict=True)) / 32
        assert absolute[n] == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
        assert difference[n] == pytest.approx(abs(float(play.values[*one]) - float(play.values[*two])), abs=1e-6)


def test_smallest_slope_covers_95_percent_and_no_smaller_one_does():
    rng = np.random.default_rng(0)
    for count in (20, 21, 39, 1000):
        x, y = rng.random(count), rng.random(count)
        K = inspected.smallest_slope(x, y)
        assert sum(y <= K * x * (1 + 1e-12)) / count >= 0.95 > sum(y <= K * x * (1 - 1e-9)) / count
    ones, zeros = np.ones(20), np.zeros(20)
    assert inspected.smallest_slope(zeros, ones) == math.inf  # like latents, other values
    assert inspected.smallest_slope(zeros, zeros) == inspected.smallest_slope(ones, zeros) == 0


def test_the_newest_histogram_is_read(tmp_path):
    """All its ratios, in their bins; and the numbers of the last iteration."""
    newest = np.concatenate((np.full(30, 0.85), np.full(70, 1.05), np.full(7, 1.3)))
    with SummaryWriter(tmp_path) as writer:
        for step, ratios, outside in ((10, np.ones(5), 0.5), (20, newest, 0.25)):
            writer.add_histogram("spi/ratios", ratios, step)
            writer.add_scalar("spi/outside_neighbourhood", outside, step)
            writer.add_scalar("losses/entropy", 1.0, step)
    numbers, bins = inspected.logged_ratios(tmp_path)
    assert numbers == {"step": 20, "outside_neighbourhood": 0.25}
    for value, count in ((0.85, 30), (1.05, 70), (1.3, 7)):
        assert [n for low, high, n in bins if low < value <= high] == [count]
    assert sum(n for *_, n in bins) == 107
    (tmp_path / "none").mkdir()
    assert inspected.logged_ratios(tmp_path / "none") == ({}, [])


# ---- The page


def inspection(run_dir: Path, **settings) -> Path:
    """The folder that an inspection leaves."""
    inspected.main(inspected.Args(run_dir, **{"games": 3, "steps": 40, "seed": 5} | settings))
    return run_dir / "inspection"


def rows_shown(page: str, name: str) -> list[list[str]]:
    """A table of the page, its header included."""
    (table,) = re.findall(rf'<table id="{name}">\n(.*?)\n</table>', page, re.DOTALL)
    return [[html.unescape(x) for x in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table.splitlines()]


def pictures_of(page: str) -> list[Image.Image]:
    contents = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)">', page)
    assert len(contents) == page.count("<img")
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in contents]


@SCRIPTS
def test_page_and_tables_of_every_script(script, runs):
    """The page shows the tables' numbers, needs nothing from outside, and has pictures that are none of them blank."""
    folder = inspection(runs(script), **({"games": 2, "steps": 16} if script in ATARI else {}))
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)|href=", page)
    pictures = pictures_of(page)
    assert len(pictures) >= 7
    for picture in pictures:
        assert np.asarray(picture.convert("L")).std() > 5
    expected = {"open_loop", "nearest", "policies", "calibration", "pairs", "representation", "rows"}
    expected |= {"neighbourhood", "ratios"} | ({"rewards"} if script is not spr_ppo_atari else set())
    assert {path.stem for path in folder.glob("*.csv")} == expected
    shown = set(re.findall(r'<table id="(\w+)">', page))
    assert shown == expected - {"nearest", "pairs", "rows", "ratios"}
    for name in shown:
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert rows and rows_shown(page, name)[0] == header
        for row, cells in zip(rows, rows_shown(page, name)[1:], strict=True):
            for x, cell in zip(row, cells, strict=True):
                is_number = re.fullmatch(r"-?[\d.]+(e[-+]\d+)?", x)
                assert float(cell) == pytest.approx(float(x), rel=0.006) if is_number else cell == x, (name, x, cell)


def test_tables_of_the_page_follow_from_its_rows(runs):
    """Means of C = 1, the table of rewards and the film's stretch, from rows.csv alone."""
    folder = inspection(runs(deep_spi_ppo), games=4, steps=200)
    rows = table_of(folder / "rows.csv")
    play = inspected.record(*parts_of(runs(deep_spi_ppo), games=4), 200)
    assert len(rows) == int(play.mask.sum()) < 4 * 200  # resets are no rows
    own = {row["loss"]: row for row in table_of(folder / "calibration.csv") if row["C"] == "1.0"}
    pairs = {"L_P": ("transition_loss", "transition_loss_copy"), "L_R": ("reward_loss", "reward_loss_zero")}
    pairs["L_P sample"] = ("transition_loss_sample", "transition_loss_copy")
    assert own.keys() == pairs.keys()
    for name, columns in pairs.items():
        loss, trivial = (np.mean([float(row[column]) for row in rows]) for column in columns)
        assert float(own[name]["mean"]) == pytest.approx(loss, rel=1e-5)
        assert float(own[name]["trivial"]) == pytest.approx(trivial, rel=1e-5)
        assert float(own[name]["less trivial"]) == pytest.approx(loss - trivial, rel=1e-4, abs=1e-9)
    (line,) = table_of(folder / "rewards.csv")  # CartPole has one reward
    predicted = [float(row["predicted_reward"]) for row in rows]
    assert int(line["transitions"]) == len(rows)
    assert float(line["mean R̄"]) == pytest.approx(np.mean(predicted), rel=1e-5)
    assert float(line["std R̄"]) == pytest.approx(np.std(predicted), rel=1e-4, abs=1e-7)
    totals = {
        (start, game): sum(
            float(row["transition_loss"])
            for row in rows
            if int(row["game"]) == game and start <= int(row["step"]) < start + 128
        )
        for game in range(4)
        for start in (0, 64)
    }
    start, game = max(totals, key=totals.get)
    assert f"Game {game}, steps {start} to {start + 127}" in (folder / "index.html").read_text()


def test_policies_differ_by_their_bound_alone(runs):
    """C = 1.1, 1.5, 3 in the table, with ratios at the bounds and nowhere beyond."""
    policies = table_of(inspection(runs(deep_spi_ppo)) / "policies.csv")
    assert [float(row["C"]) for row in policies] == [1, 1.1, 1.5, 3]
    moved = [float(row["moved"]) for row in policies]
    assert moved == sorted(moved) and moved[0] == 0 < moved[1]
    for row in policies:
        C = float(row["C"])
        assert 1 / C - 1e-9 <= float(row["least ratio"]) <= 1 <= float(row["largest ratio"]) <= C + 1e-9
        assert 0 < int(row["transitions"]) <= 120


@pytest.mark.slow
def test_two_inspections_are_equal_to_the_last_byte(runs):
    contents = []
    for seed in (5, 5, 6):
        folder = inspection(runs(deep_spi_ppo), seed=seed)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] and contents[0]["rows.csv"] != contents[2]["rows.csv"]


def test_a_lander_is_pictured_and_a_frozen_lake_has_bars(tmp_path):
    for env_id, shape in (("LunarLander-v3", (100, 150, 3)), ("FrozenLake-v1", (48, 96))):
        run_dir = trained(deep_spi_ppo, tmp_path / env_id, env_id=env_id)
        model, args = parts_of(run_dir)
        pictures = inspected.record(model, args, 20).pictures
        assert pictures.shape == (21, 3, *shape) and pictures.std() > 5
        assert (pictures[0] != pictures[-1]).any()
        assert (inspection(run_dir) / "index.html").is_file()


def test_what_is_not_there_is_said_in_a_line(runs, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs(deep_spi_ppo), run_dir)
    (run_dir / "checkpoint.pt").unlink()  # agent.pt has no scale of the rewards
    for path in run_dir.glob("events.*"):
        path.unlink()
    shutil.rmtree(run_dir / "inspection", ignore_errors=True)
    folder = inspection(run_dir)
    page = (folder / "index.html").read_text()
    assert "the scale was in checkpoint.pt" in page and "final weights" in page
    assert "no TensorBoard events" in page
    assert not {"rewards.csv", "ratios.csv", "neighbourhood.csv"} & {path.name for path in folder.iterdir()}
    assert "has no reward model" in (inspection(runs(spr_ppo_atari), games=2, steps=16) / "index.html").read_text()
    untrained = trained(deep_spi_ppo, tmp_path / "untrained", env_id="CartPole-v1", transition_loss_coef=0.0)
    page = (inspection(untrained) / "index.html").read_text()
    assert "P̄ has learned nothing by itself" in page and "R̄ has learned nothing" not in page


def test_a_renamed_and_changed_copy_of_a_script_is_inspected(tmp_path):
    """With the run's own copy, also when the original has moved on; interrupted, that is without agent.pt."""
    source = Path(deep_spi_ppo.__file__).read_text()
    original = tmp_path / "my_agent.py"
    original.write_text(source.replace("latent_size = 32", "latent_size = 12"))
    run_dir = trained(evaluate.load_script(original, tmp_path), tmp_path / "run", env_id="CartPole-v1")
    original.write_text("raise RuntimeError('I have moved on')")
    (run_dir / "agent.pt").unlink()
    page = (inspection(run_dir) / "index.html").read_text()
    assert "my_agent.py" in page and "The latent has 12 numbers" in page and "after 64 steps" in page


def refused(capsys, run_dir: Path, **settings) -> str:
    """The one line with which it refuses; it leaves nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        inspected.main(inspected.Args(run_dir, **settings))
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert stopped.value.code == 2 and captured.out == "" and not (run_dir / "inspection").exists()
    return line


def test_bad_input(runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(runs(deep_spi_ppo), run_dir)
    shutil.rmtree(run_dir / "inspection", ignore_errors=True)
    for name, values in {"games": (1, 0, -1, 257), "steps": (14, 0, 10_001), "seed": (-1, 2**63)}.items():
        for value in values:
            assert f"--{name}: got '{value}'" in refused(capsys, run_dir, **{name: value})
    assert "65,536" in refused(capsys, run_dir, games=256, steps=1000)
    assert "config.json" in refused(capsys, tmp_path / "nowhere")
    content = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert "damaged" in refused(capsys, run_dir)
    (run_dir / "checkpoint.pt").write_bytes(content)
    config = json.loads((run_dir / "config.json").read_text())
    config["args"]["env_id"] = "Acrobot-v1"
    (run_dir / "config.json").write_text(json.dumps(config))
    assert "not its agent's" in refused(capsys, run_dir)
    baseline = trained(ppo_baseline, tmp_path / "baseline", total_timesteps=32)
    assert "ppo_baseline.py's agent has no world model" in refused(capsys, baseline)


@pytest.mark.slow
def test_from_the_command_line_in_any_locale(runs):
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "inspect_world_model.py")]
    for flags, text in ((["--help"], "What does the world model of a run know?"), (["--steps=1"], "--steps")):
        given = [*command, str(runs(deep_spi_ppo)), *flags]
        done = subprocess.run(given, env=os.environ | ascii_only, capture_output=True, timeout=120)
        assert done.returncode == (0 if flags == ["--help"] else 2), done.stderr
        assert text in " ".join((done.stdout + done.stderr).decode().split())


# ---- In a browser


def browser() -> str:
    """Chromium's command. Skips the test where there is none."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    return next(found, None) or pytest.skip("no chromium, chromium-browser or google-chrome on PATH")


def in_browser(path: Path, *flags: str) -> str:
    """What Chromium prints of a page that it opens without a network."""
    profile = f"--user-data-dir={path.parent.parent / 'browser'}"
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    done = subprocess.run(
        [browser(), *fixed, profile, *flags, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [deep_spi_ppo_atari, deep_spi_ppo], ids=lambda script: script.__name__)
def test_page_in_a_browser(script, tmp_path):
    """Chromium decodes every picture and lays the page out; its screenshot has the pictures where they should be."""
    browser()
    env_id = "Pong-v5" if script in ATARI else "LunarLander-v3"
    run_dir = trained(script, tmp_path / "run", env_id=env_id, num_envs=8, total_timesteps=25 * 64)
    path = inspection(run_dir, games=4, steps=64) / "index.html"
    # A copy of the page reports, once it is laid out, what its pictures are and where.
    report = """<script>onload = () => { document.body.innerHTML = JSON.stringify({
        height: document.documentElement.scrollHeight, width: document.documentElement.scrollWidth,
        images: [...document.images].map(image => { const box = image.getBoundingClientRect();
            return [image.naturalWidth, image.naturalHeight, box.x, box.y, box.width, box.height] })}) }</script>"""
    probe = path.with_name("probe.html")
    probe.write_text(path.read_text().replace("</html>", report + "</html>"))
    dom = in_browser(probe, "--window-size=1000,1000", "--dump-dom")
    seen = json.loads(re.search(r'\{"height.*\]\]\}', html.unescape(dom))[0])
    sizes = [picture.size for picture in pictures_of(path.read_text())]
    assert len(sizes) >= 7 and [tuple(image[:2]) for image in seen["images"]] == sizes  # all decoded
    assert seen["width"] <= 1000 and 2500 < seen["height"] < 8000  # nothing sticks out
    shot = tmp_path / "page.png"
    in_browser(path, f"--window-size=1000,{seen['height']}", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L")).astype(float)
    assert pixels.shape == (seen["height"], 1000)
    for _, _, x, y, width, height in seen["images"]:
        part = pixels[round(y) : round(y + height), round(x) : round(x + width)]
        assert part.std() > 5 and (part == 255).mean() < 0.995, (x, y)
    bands = [band.std() for band in np.array_split(pixels, 20)]
    assert sum(std > 5 for std in bands) >= 18  # text, tables and charts from top to bottom
