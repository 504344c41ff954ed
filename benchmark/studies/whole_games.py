"""Which games end untold, and which points are missing: python -m benchmark.studies.whole_games

With `episodic_life`, as the Atari scripts play, EnvPool answers a lost life with 1 to `noop_max` frames without input.
Their rewards are in no row, and a game that ends in them is followed by a new one without any flag. All 57 games are
played here, with two policies that need no training, and counted:

    told        ends that EnvPool tells: info["terminated"] or truncated
    untold      resets after a lost life across which `lives` goes up: a new game has begun
    missing     points of the console's score, read from info["ram"], that are in no reward: of the frames after a lost
                life, and of those before a game's first row. Those of a game's last frames, if its end was untold, are
                in nobody's memory: the RAM is the next game's by then.

A score's place in the RAM is believed if its change equals info["reward"] on the game's ordinary rows: all but those
that answer a reset and those that end a game, whose RAM may be the next game's.

One process, about 20 minutes; finished rows of the CSV file are skipped. `--write-docs` writes docs/environments.md's
tables anew.
"""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import envpool
import numpy as np

from benchmark.common import markdown, mean_interval, read_table
from benchmark.report.runs import read_known_scores
from benchmark.studies.confounding import append_row, provenance

ROOT = Path(__file__).parent.parent.parent
CSV, DOCUMENT = ROOT / "benchmark" / "results" / "whole_games.csv", ROOT / "docs" / "environments.md"
GAMES = list(read_known_scores())
EMULATOR = {"episodic_life": True, "noop_max": 60, "repeat_action_probability": 0.3}
LEFT = 4  # of the 18 actions
LONGEST_HOLD = 500  # steps
NUM_ENVS = 8
LENGTHS = {"random": (3, 7_000), "held": (None, 1_500), "LEFT": (None, 3_000)}  # told games per environment, most steps

# ---- The console's score

Decoder = Callable[[np.ndarray], np.ndarray]  # RAM, uint8 (..., 128) → score (...)


def two_digits(byte: np.ndarray) -> np.ndarray:
    """Binary-coded decimal: a digit in each half of the byte, (...) → (...)."""
    return (byte >> 4) * 10.0 + (byte & 15)


def decimal(*places: int, unit: float = 1) -> Decoder:
    """Two digits a byte, lowest byte first."""
    return lambda ram: unit * sum(two_digits(ram[..., place]) * 100.0**i for i, place in enumerate(places))


def digits(*places: int, unit: float = 1) -> Decoder:
    """A digit in the lower half of each byte, lowest first; 10 is a zero that is not shown."""
    return lambda ram: unit * sum(shown(ram[..., place] & 15) * 10.0**i for i, place in enumerate(places))


def shown(digit: np.ndarray) -> np.ndarray:
    return np.where(digit == 10, 0.0, digit)


def eighths(*places: int, unit: float = 1) -> Decoder:
    """Eight times a digit in each byte, lowest first; more than 9 is a zero that is not shown."""

    def score(ram: np.ndarray) -> np.ndarray:
        values = [ram[..., place] >> 3 for place in places]
        return unit * sum(np.where(value > 9, 0, value) * 10.0**i for i, value in enumerate(values))

    return score


def lead(mine: Decoder, theirs: Decoder) -> Decoder:
    """The score of a game for two is the difference."""
    return lambda ram: mine(ram) - theirs(ram)


def battle_zone(ram: np.ndarray) -> np.ndarray:
    low, high = ram[..., 29], ram[..., 30]
    return 1000.0 * (shown(low >> 4) + 10 * shown(high & 15) + 100 * shown(high >> 4))


def enduro(ram: np.ndarray) -> np.ndarray:
    """Cars passed: 200 on the first day, 300 on each later one; the RAM has those still to pass."""
    day, left = ram[..., 45].astype(float), decimal(43, 44)(ram)
    return np.select([day == 0, day == 1], [0, 200 - left], 200 + (day - 1) * 300 - left)


def phoenix(ram: np.ndarray) -> np.ndarray:
    return decimal(72, 73, unit=100)(ram) + 10.0 * (ram[..., 71] >> 4)


def skiing(ram: np.ndarray) -> np.ndarray:
    """Minus the time, in hundredths of a second."""
    return -(6000.0 * ram[..., 104] + decimal(106, 105)(ram))


SCORES: dict[str, Decoder] = {
    "Alien": eighths(11, 9, 7, 5, 3, unit=10),
    "Amidar": decimal(89, 90, 91),
    "Assault": decimal(2, 1, 0),
    "Asterix": decimal(96, 95, 94),
    "Asteroids": decimal(62, 61, unit=10),
    "Atlantis": decimal(34, 35, 33, unit=100),
    "BankHeist": decimal(90, 89, 88),
    "BattleZone": battle_zone,
    "BeamRider": decimal(9, 10, 11),
    "Berzerk": decimal(95, 94, 93),
    "Bowling": decimal(33, 38),
    "Boxing": lead(decimal(18), decimal(19)),
    "Breakout": decimal(77, 76),
    "Centipede": decimal(118, 117, 116),
    "ChopperCommand": decimal(110, 108, unit=100),
    "CrazyClimber": digits(2, 3, 4, 5, unit=100),
    "Defender": digits(28, 29, 30, 31, 32, 33),
    "DemonAttack": decimal(5, 3, 1),
    "DoubleDunk": lead(decimal(118), decimal(119)),
    "Enduro": enduro,
    "FishingDerby": lead(decimal(61), decimal(62)),
    "Freeway": decimal(103),
    "Frostbite": decimal(74, 73, 72),
    "Gopher": decimal(50, 49, 48),
    "Gravitar": decimal(9, 8, 7),
    "Hero": decimal(57, 56, 55),
    "IceHockey": lead(decimal(10), decimal(11)),
    "Jamesbond": decimal(92, 93, 94),
    "Kangaroo": decimal(40, 39, unit=100),
    "Krull": decimal(30, 29, 28),
    "KungFuMaster": decimal(26, 25, 24),
    "MontezumaRevenge": decimal(21, 20, 19),
    "MsPacman": decimal(120, 121, 122),
    "NameThisGame": decimal(70, 69, 68),
    "Phoenix": phoenix,
    "Pitfall": decimal(87, 86, 85),
    "Pong": lead(lambda ram: ram[..., 14].astype(float), lambda ram: ram[..., 13].astype(float)),
    "PrivateEye": decimal(74, 73, 72),
    "Qbert": decimal(91, 90, 89),
    "Riverraid": eighths(87, 85, 83, 81, 79, 77),
    "RoadRunner": digits(73, 74, 75, 76, unit=100),
    "Robotank": lambda ram: 12.0 * ram[..., 54] + ram[..., 53],  # squadrons of twelve, and tanks
    "Seaquest": decimal(58, 57, 56),
    "Skiing": skiing,
    "Solaris": decimal(92, 93, 94, unit=10),
    "SpaceInvaders": decimal(104, 102),
    "StarGunner": digits(3, 4, 5, 6, unit=100),
    "Surround": lead(decimal(119), decimal(118)),
    "TimePilot": decimal(13, 15, unit=100),
    "Tutankham": decimal(28, 26),
    "UpNDown": decimal(2, 1, 0),
    "Venture": decimal(72, 71, unit=100),
    "VideoPinball": decimal(48, 50, 52),
    "WizardOfWor": decimal(6, 8, unit=100),
    "YarsRevenge": decimal(98, 97, 96),
    "Zaxxon": decimal(105, 104, unit=100),
}  # Tennis has none: its reward is points or games, whichever changed, and no score's change
FIRST_SCORE = {"Pitfall": 2000.0, "PrivateEye": 1000.0}  # the rest begin at 0

# ---- Playing


@dataclass
class Rows:
    """What EnvPool answered: row 0 to the reset, row t to step t. (T + 1, N) each; ram (T + 1, N, 128)."""

    reward: np.ndarray  # float, unclipped
    lives: np.ndarray  # int
    told: np.ndarray  # bool: the game ended
    is_last: np.ndarray  # bool: a life or the game ended, or its time; the next row answers a reset
    one_frame: np.ndarray  # bool: the stack has one frame four times, as after the start of a game
    ram: np.ndarray  # uint8


def actions(policy: str, num_actions: int, num_envs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Actions (N,) without end; each `send` says whose game ended, as told, (N,).

    "random" draws each step. "held" holds an action until the game ends, at most 500 steps, as some end no game;
    "LEFT" always is LEFT.
    """
    held, since = rng.integers(num_actions, size=num_envs), np.zeros(num_envs, int)
    while True:
        drawn = rng.integers(num_actions, size=num_envs)
        ended = yield {"random": drawn, "held": held, "LEFT": np.full(num_envs, LEFT)}[policy]
        since += 1
        again = ended | (since == LONGEST_HOLD)
        held, since = np.where(again, drawn, held), np.where(again, 0, since)


def play(game: str, policy: str, most_games: int | None, most_steps: int, num_envs: int, seed: int) -> Rows:
    """Play until each environment told the end of `most_games`, or `most_steps` steps in each.

    The same arguments give the same rows. Environments that are done play on until the last one is.
    """
    stream = np.random.SeedSequence(seed, spawn_key=(GAMES.index(game), list(LENGTHS).index(policy)))
    envs = envpool.make(
        f"{game}-v5",
        env_type="gymnasium",
        num_envs=num_envs,
        num_threads=1,
        env_seed=(stream.generate_state(num_envs) >> 1).tolist(),  # signed 32 bits
        **EMULATOR,
    )
    policy_actions = actions(policy, int(envs.action_space.n), num_envs, np.random.default_rng(stream))
    obs, info = envs.reset()
    told = is_last = np.zeros(num_envs, bool)
    rows, told_games = [], np.zeros(num_envs, int)
    for t in range(most_steps + 1):
        if t > 0:
            action = next(policy_actions) if t == 1 else policy_actions.send(told)
            obs, _, terminated, truncated, info = envs.step(action)
            told, is_last = info["terminated"].astype(bool) | truncated, terminated | truncated
        one_frame = (obs == obs[:, :1]).all((1, 2, 3))
        rows.append((info["reward"].astype(float), info["lives"], told, is_last, one_frame, info["ram"]))
        told_games += told
        if most_games is not None and (told_games >= most_games).all():
            break
    envs.close()
    return Rows(*(np.stack(column) for column in zip(*rows, strict=True)))


# ---- Counting


def starts(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The rows in which a game begins, as told and in truth, bool (T + 1, N) each.

    A game begins in row 0, in the row after a told end, and in a row that answers a lost life and has more lives than
    the row before it.
    """
    told, untold = np.ones_like(rows.told), np.zeros_like(rows.told)
    told[1:] = rows.told[:-1]
    untold[1:] = rows.is_last[:-1] & ~rows.told[:-1] & (rows.lives[1:] > rows.lives[:-1])
    return told, told | untold


def counted_rows(rows: Rows, most_games: int | None) -> np.ndarray:
    """Those up to the end of each environment's first `most_games` told games: bool (T + 1, N).

    A mean over all games that ended within a time would have too few long ones.
    """
    ended_before = np.cumsum(rows.told, axis=0) - rows.told
    return ended_before < (np.inf if most_games is None else most_games)


def whole_sums(values: np.ndarray, begins: np.ndarray, rows: Rows, counted: np.ndarray) -> np.ndarray:
    """Sum of `values` (T + 1, N) over each game that began and ended in counted rows, by environment: (games,)."""
    sums = []
    for value, begin, told, count in zip(values.T, begins.T, rows.told.T, counted.T, strict=True):
        parts = np.add.reduceat(value[count], np.flatnonzero(begin[count]))
        sums.append(parts if told[count][-1] else parts[:-1])  # without the one under way
    return np.concatenate(sums)


def measure(game: str, rows: Rows, most_games: int | None = None) -> dict[str, float | int | str]:
    """The counts of each environment's first `most_games` told games, or of all rows.

    "" stands where there is nothing to take the mean of, or no score is known.
    """
    counted = counted_rows(rows, most_games)
    told, true = (begin & counted for begin in starts(rows))
    lost_life = np.zeros_like(told)
    lost_life[1:] = rows.is_last[:-1]
    lost_life &= counted & ~told
    returns = whole_sums(rows.reward, told, rows, counted)
    true_returns = whole_sums(rows.reward, true, rows, counted)
    found = {
        "told": int((rows.told & counted).sum()),
        "untold": int((true & ~told).sum()),
        "untold_by_frames": int((lost_life & rows.one_frame).sum()),
        "lost_lives": int(lost_life.sum()),
        "mean_return_told": mean(returns),
        "mean_return": mean(true_returns),
    }
    if game not in SCORES:
        return found
    score = SCORES[game](rows.ram)
    change = np.diff(score, axis=0, prepend=FIRST_SCORE.get(game, 0.0))
    opening = score - FIRST_SCORE.get(game, 0.0)
    resumed = lost_life & ~true
    ordinary = counted & ~told & ~lost_life & ~rows.told
    points = np.where(true, opening, np.where(resumed, change, 0.0))  # of frames that are in no row
    missing = whole_sums(points, true, rows, counted)
    low, high = mean_interval(missing) if len(missing) > 1 else ("", "")
    return found | {
        "rows": int(ordinary.sum()),
        "rows_with_points": int((ordinary & (rows.reward != 0)).sum()),
        "rows_unequal": int((ordinary & (change != rows.reward)).sum()),
        "missing_per_lost_life": mean(points[resumed]),
        "missing_at_start": mean(points[true]),
        "missing_per_game": mean(missing),
        "missing_low": low,
        "missing_high": high,
        "mean_console_score": mean(true_returns + missing),
    }


def mean(values: np.ndarray) -> float | str:
    return values.mean() if len(values) else ""


# ---- The CSV file and the tables

POLICIES = [*((game, policy) for game in GAMES for policy in ("random", "held")), ("RoadRunner", "LEFT")]
COUNTS = ("told", "untold", "untold_by_frames", "lost_lives", "rows", "rows_with_points", "rows_unequal")
MEANS = ("mean_return_told", "mean_return", "mean_console_score")
MISSING = ("missing_per_lost_life", "missing_at_start", "missing_per_game", "missing_low", "missing_high")
SETTINGS = ("most_games", "most_steps", "num_envs", "seed", *EMULATOR)
COLUMNS = ["game", "policy", *COUNTS, *MEANS, *MISSING, *SETTINGS, "versions", "git_commit"]
ENOUGH_POINTS, MOST_UNEQUAL = 10, 0.01  # rows; share of the rows with points

Results = dict[tuple[str, str], dict[str, str]]  # (game, policy) → row


def read(path: Path = CSV) -> Results:
    return {(row["game"], row["policy"]): row for row in read_table(path)}


def unreadable(game: str, results: Results) -> str:
    """Why the game's score is not believed, over all its rows; "" if it is."""
    if game not in SCORES:
        return "not readable"
    own = [row for (name, _), row in results.items() if name == game]
    points, unequal = (sum(int(row[column]) for row in own) for column in ("rows_with_points", "rows_unequal"))
    if unequal > MOST_UNEQUAL * points:
        return "not readable"
    return "" if points >= ENOUGH_POINTS else "too few points"


def number(value: str, digits: int = 1) -> str:
    return f"{round(float(value), digits) + 0.0:,.{digits}f}" if value else ""  # + 0.0: no "-0.0"


def interval(row: dict[str, str]) -> str:
    """Points missing per game, with a 95 % interval over games if they differ."""
    found, low, high = (row[column] for column in ("missing_per_game", "missing_low", "missing_high"))
    return number(found) + (f" [{number(low)}, {number(high)}]" if low != high else "")


def untold_table(results: Results) -> str:
    """Game and policy: where games ended untold, and what that does to the mean."""
    rows = []
    for (game, policy), row in results.items():
        told, untold = int(row["told"]), int(row["untold"])
        if untold:
            means = [number(row["mean_return_told"]), number(row["mean_return"])]
            rows.append([game, policy, f"{told:,}", f"{untold:,}", *means])
    return markdown(["game", "policy", "told", "untold", "mean return as told", "mean return of a game"], rows)


def missing_table(results: Results) -> str:
    """Games in which points are missing, most first by their share of the human-normalised scale."""
    rows, known = [], read_known_scores()
    for game in GAMES:
        own = [results[game, policy] for policy in ("random", "held") if (game, policy) in results]
        if (
            len(own) < 2
            or unreadable(game, results)
            or not any(
                float(row[column] or 0) for row in own for column in ("missing_per_lost_life", "missing_at_start")
            )
        ):
            continue
        row, held = own
        scale = known[game]["human"] - known[game]["random"]
        share = float(row["missing_per_game"] or 0) / scale
        cells = [number(row["missing_per_lost_life"], 2), number(held["missing_per_lost_life"], 2), interval(row)]
        means = [number(row["mean_return_told"]), number(row["mean_console_score"])]
        rows.append((abs(share), [game, *cells, *means, f"{share:.4f}"]))
    header = [
        "game",
        "per lost life",
        "the same, held action",
        "per game",
        "mean return as told",
        "mean console score",
        "human-normalised",
    ]
    return markdown(header, [row for _, row in sorted(rows, key=lambda pair: -pair[0])])


def games_table(results: Results) -> str:
    """Every game: counts of both policies, and whether its score could be read."""
    rows = []
    for game in GAMES:
        own = [results[game, policy] for policy in ("random", "held") if (game, policy) in results]
        if not own:
            continue
        counts = [f"{int(row[column]):,}" for row in own for column in ("told", "untold", "lost_lives")]
        why = unreadable(game, results)
        equal = "" if game not in SCORES else f"{sum(int(row['rows_with_points']) for row in own):,}"
        unequal = "" if game not in SCORES else f"{sum(int(row['rows_unequal']) for row in own):,}"
        missing = why or interval(own[0])
        console = "" if why else number(own[0]["mean_console_score"])
        rows.append([game, *counts, equal, unequal, missing, number(own[0]["mean_return_told"]), console])
    header = ["game"]
    header += [f"{policy}: {count}" for policy in ("random", "held") for count in ("told", "untold", "lost lives")]
    header += ["rows with points", "unequal", "missing per game", "mean return as told", "mean console score"]
    return markdown(header, rows)


TABLES = {"untold_ends": untold_table, "missing_points": missing_table, "whole_games": games_table}


def with_tables(document: str, results: Results) -> str:
    """The document's text with every table written anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + TABLES[match[2]](results) + "\n" + match[3],
        document,
        flags=re.DOTALL,
    )


def refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def settings_of(policy: str, seed: int) -> dict[str, str]:
    """The settings of a row, as the CSV file has them; most_games is "" without a limit."""
    most_games, most_steps = LENGTHS[policy]
    given = {"most_games": most_games or "", "most_steps": most_steps, "num_envs": NUM_ENVS, "seed": seed}
    return {name: str(value) for name, value in (given | EMULATOR).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=GAMES, metavar="GAME", help="some of the 57 (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=CSV, help="CSV file; rows that it has are not made again")
    parser.add_argument("--write-docs", action="store_true", help="write docs/environments.md's tables; play nothing")
    args = parser.parse_args()
    for game in args.games:
        if game not in GAMES:
            refuse(f"--games: got {game}; it is none of the 57 in benchmark/report/atari57_scores.csv")
    if args.seed < 0:
        refuse(f"--seed: got {args.seed}; must not be negative")
    if args.write_docs:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), read(args.out)), encoding="utf-8")
        return
    results = read(args.out)
    for (_, policy), row in results.items():
        if any(row[name] != value for name, value in settings_of(policy, args.seed).items()):
            refuse(f"--out: got {args.out}, which was made with other settings; name another file")
    made_with = provenance()
    made_with["versions"] += f" envpool={importlib.metadata.version('envpool')}"
    for game, policy in POLICIES:
        if game in args.games and (game, policy) not in results:
            rows = play(game, policy, *LENGTHS[policy], NUM_ENVS, args.seed)
            found = measure(game, rows, LENGTHS[policy][0])
            numbers = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in found.items()}
            row = {"game": game, "policy": policy} | numbers | settings_of(policy, args.seed) | made_with
            append_row(args.out, COLUMNS, row)
            print(f"{game}, {policy}: {found['told']} told, {found['untold']} untold", flush=True)


if __name__ == "__main__":
    main()
