"""The scan of all games: places of the score, counting, and that the document says what was measured."""

import dataclasses
import sys

import numpy as np
import pytest

from benchmark.report.runs import read_known_scores
from benchmark.studies import whole_games
from benchmark.studies.whole_games import GAMES, LENGTHS, POLICIES, Rows, measure

RESULTS = whole_games.read()


def ram(**places: int) -> np.ndarray:
    """A console's memory, (128,): r12=0x34 is byte 12."""
    memory = np.zeros(128, np.uint8)
    for place, byte in places.items():
        memory[int(place[1:])] = byte
    return memory


@pytest.mark.parametrize(
    ("game", "memory", "score"),
    [
        ("Atlantis", ram(r34=0x12, r35=0x34, r33=0x56), 56_341_200),
        ("Breakout", ram(r77=0x98, r76=0x07), 798),
        ("RoadRunner", ram(r73=0xA5, r74=0x0A, r75=0x09, r76=0x0A), 90_500),  # upper halves and 10 are no digits
        ("Alien", ram(r11=9 << 3, r9=0x80, r7=1 << 3), 1_090),  # 0x80: a zero that is not shown
        ("Riverraid", ram(r87=88, r85=72, r83=8, r81=88), 190),
        ("BattleZone", ram(r29=0x3A, r30=0xA9), 93_000),
        ("BattleZone", ram(r29=0xA0, r30=0x99), 990_000),  # more than a byte holds
        ("Enduro", ram(r45=0), 0),
        ("Enduro", ram(r45=1, r43=0x97, r44=0x01), 3),
        ("Enduro", ram(r45=3, r43=0x50, r44=0x02), 550),
        ("Phoenix", ram(r71=0x70, r72=0x21, r73=0x43), 432_170),
        ("Skiing", ram(r104=2, r105=0x34, r106=0x56), -15_456),
        ("Boxing", ram(r18=0x12, r19=0x99), -87),
        ("Pong", ram(r13=21, r14=3), -18),
        ("Robotank", ram(r54=2, r53=11), 35),
    ],
)
def test_score_of_known_memory(game, memory, score):
    assert whole_games.SCORES[game](memory) == score
    assert whole_games.SCORES[game](np.stack([memory] * 3)[None]).tolist() == [[score] * 3]


def made_up_rows(seed: int, game: str = "Breakout", shape: tuple[int, int] = (200, 3)) -> Rows:
    """Rows of games that end told or untold at random, with a score that is in the memory."""
    rng = np.random.default_rng(seed)
    rows = Rows(*(np.zeros(shape, kind) for kind in (float, int, bool, bool, bool)), np.zeros((*shape, 128), np.uint8))
    for n in range(shape[1]):
        lives, score, told, is_last = 3, 0, True, True  # row 0 answers the reset
        for t in range(shape[0]):
            reward = 0
            if is_last:
                untold = not told and rng.random() < 0.3
                if told or untold:
                    lives, score = 3, 0
                score += int(rng.integers(3))
                rows.one_frame[t, n] = told or untold
                told = is_last = False
            else:
                reward = int(rng.integers(5))
                score += reward
                is_last = bool(rng.random() < 0.2)
                lives -= is_last
                told = lives == 0 or bool(rng.random() < 0.02)
                is_last |= told
            rows.reward[t, n], rows.lives[t, n], rows.told[t, n], rows.is_last[t, n] = reward, lives, told, is_last
            low, high = score % 100, score // 100
            rows.ram[t, n, 77], rows.ram[t, n, 76] = (x // 10 * 16 + x % 10 for x in (low, high))
    return rows


def plain_count(rows: Rows, most_games: int | None) -> dict[str, float]:
    """What `measure` finds, a row at a time. Every game's score is Breakout's."""
    ends, flagged, games, console, missing, per_life, openings = [], [], [], [], [], [], []
    for n in range(rows.reward.shape[1]):
        told_games = 0
        for t in range(rows.reward.shape[0]):
            score = whole_games.SCORES["Breakout"](rows.ram[t, n])
            before = whole_games.SCORES["Breakout"](rows.ram[t - 1, n])
            if t == 0 or rows.told[t - 1, n]:
                flagged_return = game_return = 0
                lost = score
                openings.append(score)
            elif rows.is_last[t - 1, n]:
                if rows.lives[t, n] > rows.lives[t - 1, n]:
                    ends.append("untold")
                    games.append(game_return)
                    console.append(game_return + lost)
                    missing.append(lost)
                    game_return, lost = 0, score
                    openings.append(score)
                else:
                    ends.append("lost life")
                    lost += score - before
                    per_life.append(score - before)
            flagged_return += rows.reward[t, n]
            game_return += rows.reward[t, n]
            if rows.told[t, n]:
                ends.append("told")
                flagged.append(flagged_return)
                games.append(game_return)
                console.append(game_return + lost)
                missing.append(lost)
                told_games += 1
                if told_games == most_games:
                    break
    return {
        "told": ends.count("told"),
        "untold": ends.count("untold"),
        "lost_lives": ends.count("lost life") + ends.count("untold"),
        "mean_return_told": np.mean(flagged),
        "mean_return": np.mean(games),
        "mean_console_score": np.mean(console),
        "missing_per_game": np.mean(missing),
        "missing_per_lost_life": np.mean(per_life),
        "missing_at_start": np.mean(openings),
    }


@pytest.mark.parametrize("most_games", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_a_plain_loop(seed, most_games):
    rows = made_up_rows(seed)
    found, expected = measure("Breakout", rows, most_games), plain_count(rows, most_games)
    assert expected["untold"] > 0 and expected["missing_per_lost_life"] > 0
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["untold_by_frames"] == found["untold"] and found["rows_unequal"] == 0
    assert found["missing_low"] <= found["missing_per_game"] <= found["missing_high"]


def test_a_told_end_in_the_last_row_is_a_whole_game():
    rows = made_up_rows(0)
    last = np.flatnonzero(rows.told[:, 0])[-1]
    cut = Rows(*(getattr(rows, field.name)[: last + 1, :1] for field in dataclasses.fields(rows)))
    assert measure("Breakout", cut) == pytest.approx({**measure("Breakout", cut), **plain_count(cut, None)})


def test_a_score_that_is_not_the_reward_is_not_believed():
    rows = made_up_rows(1)
    found = {("Breakout", "random"): measure("Breakout", rows)}
    assert whole_games.unreadable("Breakout", found) == ""
    rows.reward[rows.reward == 3] = 2
    found = {("Breakout", "random"): measure("Breakout", rows)}
    assert found["Breakout", "random"]["rows_unequal"] > 0
    assert whole_games.unreadable("Breakout", found) == "not readable"
    assert whole_games.unreadable("Tennis", {}) == "not readable"


def test_no_game_ended():
    rows = made_up_rows(2)
    short = Rows(*(getattr(rows, field.name)[:2, :1] for field in dataclasses.fields(rows)))
    found = measure("Breakout", short)
    assert found["told"] == 0 and found["mean_return_told"] == found["missing_per_game"] == found["missing_low"] == ""


def test_roadrunner_ends_games_untold():
    """LEFT held: a game ends in the frames after a lost life, and two are told as one."""
    rows = whole_games.play("RoadRunner", "LEFT", None, 600, 2, seed=5)
    found = measure("RoadRunner", rows)
    assert found["untold"] > 0 and found["untold"] == found["untold_by_frames"]
    assert found["mean_return"] < found["mean_return_told"]
    assert found["rows_with_points"] > 0 and found["rows_unequal"] == 0


def test_atlantis_scores_after_a_lost_life():
    rows = whole_games.play("Atlantis", "random", None, 500, 2, seed=2)
    found = measure("Atlantis", rows)
    assert found["rows_with_points"] > 0 and found["rows_unequal"] == 0
    assert found["missing_per_lost_life"] > 0


def test_same_seed_same_rows():
    same, again, other = (whole_games.play("Breakout", "held", None, 50, 2, seed) for seed in (3, 3, 4))
    assert (same.ram == again.ram).all() and (same.reward == again.reward).all()
    assert (same.ram != other.ram).any()


def test_held_actions_change_when_a_game_ends():
    policy = whole_games.actions("held", 1000, 2, np.random.default_rng(0))
    played = [next(policy)]
    for step in range(1, 2 * whole_games.LONGEST_HOLD):
        played.append(policy.send(np.array([step == 10, False])))
    changes = [np.flatnonzero(np.diff(np.array(played)[:, n])).tolist() for n in (0, 1)]
    assert changes == [[9, 9 + whole_games.LONGEST_HOLD], [whole_games.LONGEST_HOLD - 1]]


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["whole_games", *arguments])
    whole_games.main()


def test_rows_that_are_there_are_not_made_again(monkeypatch, tmp_path, capsys):
    def play(game, policy, *lengths):
        played.append((game, policy))
        return made_up_rows(3)

    played, out = [], tmp_path / "scan.csv"
    monkeypatch.setattr(whole_games, "play", play)
    command(monkeypatch, "--games", "Alien", "--out", str(out))
    command(monkeypatch, "--games", "Alien", "RoadRunner", "--out", str(out))
    assert played == [(game, policy) for game, policy in POLICIES if game in ("Alien", "RoadRunner")]
    assert list(whole_games.read(out)) == played
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--games", "Alien", "--seed", "2", "--out", str(out))
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--games", "Chess"), ("--seed", "-1")])
def test_bad_input(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {arguments[0]}: got {arguments[1]}")


def test_committed_results_are_complete():
    assert list(RESULTS) == POLICIES and len(GAMES) == 57
    for (_, policy), row in RESULTS.items():
        expected = whole_games.settings_of(policy, seed=1)
        assert {name: row[name] for name in expected} == expected
    assert set(whole_games.SCORES) == set(GAMES) - {"Tennis"}
    assert set(LENGTHS) == {policy for _, policy in POLICIES}


def test_what_the_document_says_in_words():
    assert all(row["untold"] == row["untold_by_frames"] for row in RESULTS.values())
    assert {game for (game, _), row in RESULTS.items() if int(row["untold"])} == {"RoadRunner"}
    shares, known = {}, read_known_scores()
    for game in GAMES:
        if not whole_games.unreadable(game, RESULTS):
            scale = known[game]["human"] - known[game]["random"]
            shares[game] = float(RESULTS[game, "random"]["missing_per_game"]) / scale
    assert 0.11 < shares.pop("Atlantis") < 0.14
    assert max(shares.values()) < 0.01 and [game for game in shares if shares[game] < 0] == ["Skiing"]


def test_document_has_the_tables():
    document = whole_games.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in document for name in whole_games.TABLES)
    assert whole_games.with_tables(document, RESULTS) == document
