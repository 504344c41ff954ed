"""Every script on every game: what is whole is said to be, and what is not is said to be not."""

from benchmark.studies import every_game
from benchmark.suites import ATARI57_GAMES


def test_a_pair_that_works_and_one_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(every_game, "FILE", tmp_path / "every_game.csv")
    monkeypatch.setattr(every_game, "ATARI57_GAMES", ["Pong", "Pang"])
    for _ in range(2):  # the second time there is nothing to do for Pong
        every_game.make("dbc_ppo_atari.py")
        pang, pong = every_game.read_table(every_game.FILE)
    assert (pong["actions"], pong["steps"], pong["problem"]) == ("6", "192", "") and int(pong["evaluation_steps"]) > 0
    assert (
        pang["game"] == "Pang"
        and "SystemExit 2" in pang["problem"]
        and "must be an Atari game" in pang["problem"]
        and pang["actions"] == ""
    )
    column = every_game.SCRIPTS.index("dbc_ppo_atari.py") + 2
    pong, pang = ([c.strip() for c in line.strip("|").split("|")] for line in every_game.table().splitlines()[2:])
    assert (pong[0], pong[1], pong[column]) == ("Pong", "6", "whole") and "SystemExit" in pang[column]
    assert "not run" in pong


def test_all_scripts_and_games_are_in_it():
    assert len(every_game.SCRIPTS) == 6 and len(ATARI57_GAMES) == 57


def test_a_run_that_is_not_whole_is_found(tmp_path, monkeypatch):
    class Script:
        __file__ = "script.py"
        Args = staticmethod(lambda **settings: settings)

        @staticmethod
        def train(args):
            raise FloatingPointError("not finite: log_probs\n  more\n\n")

    monkeypatch.setattr(every_game.importlib, "import_module", lambda name: Script)
    (row,) = every_game.rows_of("ppo_baseline.py", ["Pong"])
    assert row["problem"] == "FloatingPointError: not finite: log_probs"
