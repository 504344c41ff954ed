"""How fast the Atari scripts are: python -m benchmark.throughput [--rounds 5] [--cases NAME ...]

All on the CPU. Every round runs every case once, each in a process of its own, so that a ratio compares runs made
minutes apart on the same machine; the first round's order is reversed in the next. Written after every round to
benchmark/results/throughput.csv, a line per case, round and measure. `--tables` makes no
runs, but prints the tables of the committed ones, and draws where an iteration's time goes.

The scripts run with their default precision, in bf16 where the processor has units for it; the plain form and
Stable-Baselines3 in float32. An iteration is 128 x 8 steps: the first is not counted, as it pays for memory and
libraries. Overhead is what the whole process took beyond its training: to load libraries, to build games and agent, to
save and end. The roofline is the time that an iteration's multiplications would take at the speed of a large matrix
product on this machine, plus the environment's own time.
"""

import argparse
import csv
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import envpool
import matplotlib
import numpy as np
import torch
import tyro

from benchmark.common import RESULTS, ROOT, markdown, read_events, read_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TABLE = RESULTS / "throughput.csv"
GAMES = {4: "Breakout-v5", 6: "Pong-v5", 18: "Boxing-v5"}  # by number of actions
ITERATION = 128 * 8  # agent steps
MINIBATCHES, ROWS, FRAMES = 16, 256, 288  # an iteration's updates; transitions and encoded frames of each
COUNTED = ("ppo_baseline", "deep_spi_ppo_atari", "spr_ppo_atari")  # whose operations `iteration_flops` knows
STAGES = {  # an iteration's parts, and their colours: grey, blue, red, orange, light grey
    **{"environment": "C7", "encoder, 16 updates": "C0", "P̄ and ℓ_P": "C3", "R̄ and ℓ_R": "C1", "all else": "0.8"},
}
FORMS = {  # for which numbers of actions each script is run in each form; only what P̄ is part of depends on A
    "ppo_baseline": {"": (4, 6, 18), "fp32": (6,), "learner": (6,), "plain": (6,)},
    "deepmdp_ppo_atari": {"": (4, 6, 18), "learner": (6,)},
    "deep_spi_ppo_atari": {"": (4, 6, 18), "learner": (4, 6, 18), "plain": (6, 18)},
    "spr_ppo_atari": {"": (4, 18)},
    "dbc_ppo_atari": {"": (4, 18)},
    "dream_spi_atari": {"": (4, 18)},
}
RATIOS = {  # label: above and below the fraction line, each (case, measure)
    "`ppo_baseline.py` : plain, end to end": (("ppo_baseline A=6", "sps"), ("ppo_baseline plain A=6", "sps")),
    **{
        f"`deep_spi_ppo_atari.py` : plain, end to end, A = {a}": (
            (f"deep_spi_ppo_atari A={a}", "sps"),
            (f"deep_spi_ppo_atari plain A={a}", "sps"),
        )
        for a in (6, 18)
    },
    "`deep_spi_ppo_atari.py` : `ppo_baseline.py` plain, end to end, A = 6": (
        ("deep_spi_ppo_atari A=6", "sps"),
        ("ppo_baseline plain A=6", "sps"),
    ),
    **{
        f"`{script}.py` : `ppo_baseline.py`, end to end, A = {a}": (
            (f"{script} A={a}", "sps"),
            (f"ppo_baseline A={a}", "sps"),
        )
        for script in ("deepmdp_ppo_atari", "deep_spi_ppo_atari", "spr_ppo_atari", "dbc_ppo_atari", "dream_spi_atari")
        for a in FORMS[script][""]
    },
    "`dream_spi_atari.py`, A = 18 : A = 4": (("dream_spi_atari A=18", "sps"), ("dream_spi_atari A=4", "sps")),
    **{
        f"`{script}.py` : PPO in CleanRL's form (float32), A = 4": (
            (f"{script} A=4", "sps"),
            ("cleanrl_form A=4", "sps"),
        )
        for script in ("ppo_baseline", "deep_spi_ppo_atari", "deepmdp_ppo_atari")
    },
    "Deep SPI learner, A = 18 : A = 4": (
        ("deep_spi_ppo_atari learner A=18", "sps"),
        ("deep_spi_ppo_atari learner A=4", "sps"),
    ),
    **{
        f"time of P̄ and ℓ_P : the encoder's, 256 rows, A = {a}": (
            (f"stages A={a}", "transition_256_rows_s"),
            (f"stages A={a}", "encoder_256_rows_s"),
        )
        for a in (4, 6, 18)
    },
    "`ppo_baseline.py --precision fp32` : Stable-Baselines3's PPO (float32), A = 6": (
        ("ppo_baseline fp32 A=6", "sps"),
        ("stable_baselines3 A=6", "sps"),
    ),
    "`ppo_baseline.py` : Stable-Baselines3's PPO (float32), A = 6": (
        ("ppo_baseline A=6", "sps"),
        ("stable_baselines3 A=6", "sps"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One row of the table: how to start it, and how many iterations to measure after the first."""

    command: tuple[str, ...]
    num_actions: int
    iterations: int = 3


def cases() -> dict[str, Case]:
    """Every case by name: <script> <form> A=<number of actions>. No form, or fp32: the script itself, end to end."""
    table = {}
    for script, forms in FORMS.items():
        for form, numbers in forms.items():
            for num_actions in numbers:
                start = {
                    "": (f"{script}.py",),
                    "fp32": (f"{script}.py", "--precision", "fp32"),
                    "learner": ("-m", "benchmark.throughput", "learner", script),
                    "plain": ("-m", "benchmark.peers.plain", script),
                }[form]
                command = (*start, "--env-id", GAMES[num_actions], "--num-envs", "128", "--num-steps", "8")
                name = f"{script} {form} A={num_actions}".replace("  ", " ")
                slow = form == "plain" and num_actions == 18
                table[name] = Case(command, num_actions, 1 if slow else 3)
    table["cleanrl_form A=4"] = Case(("-m", "benchmark.peers.cleanrl_form", "--env-id", GAMES[4]), 4)
    if importlib.util.find_spec("stable_baselines3"):
        table["stable_baselines3 A=6"] = Case(("-m", "benchmark.peers.sb3_ppo", "--env-id", GAMES[6]), 6)
    return table


class FrozenGames:
    """Stands in for N games that cost nothing: the same random frames at each step, no reward, no end."""

    def __init__(self, args, _start=0):
        self.num_actions = int(envpool.make_spec(args.env_id).action_space.n)
        frames = np.random.default_rng(0).integers(0, 256, (args.num_envs, 4, 84, 84), dtype=np.uint8)
        self.frames = torch.from_numpy(frames).permute(0, 2, 3, 1)
        self.rewards, self.never = torch.zeros(args.num_envs), torch.zeros(args.num_envs, dtype=torch.bool)

    def reset(self):
        return self.frames

    def step(self, actions):
        return self.frames, self.rewards, self.never, self.never, {}


def learner(script_name: str, flags: list[str]) -> None:
    """Train as the script would, but on games that cost nothing."""
    script = importlib.import_module(script_name)
    script.Games = FrozenGames
    script.train(tyro.cli(script.Args, args=flags))


def own_peak() -> int:
    """Peak memory of this process, in the unit of ru_maxrss, which on Linux may still be that of its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1])


def run(case: Case) -> dict[str, float]:
    """One process: steps per second, overhead in seconds, peak memory in GB. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        steps = str(ITERATION * (case.iterations + 1))
        flags = ["--device", "cpu", "--total-timesteps", steps, "--run-dir", f"{folder}/run"]
        log = open(Path(folder) / "log", "w+", encoding="utf-8")
        start = time.time()
        process = subprocess.Popen([sys.executable, *case.command, *flags], cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells this child's own peak memory
        wall = time.time() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(case.command)} failed:\n{log.read()[-2000:]}")
        at_step, sps = read_events(Path(folder) / "run")["charts/SPS"]
    elapsed = at_step / sps  # seconds since the start, at the end of each iteration
    if usage.ru_maxrss <= own_peak():
        raise RuntimeError("peak memory cannot be told: a child's begins with that of the process that started it")
    return {
        "sps": ITERATION / float(np.median(np.diff(elapsed))),
        "overhead_s": wall - float(elapsed[-1]),
        "peak_memory_gb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
    }


def timed(function, repeats: int = 5) -> float:
    """Median seconds of a call, after two that are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def stages(num_actions: int) -> dict[str, float]:
    """Seconds of an update's parts, forward and backward, on one minibatch, and the operations of an iteration."""
    script = importlib.import_module("deep_spi_ppo_atari")
    torch.manual_seed(0)
    agent = script.Agent(num_actions)
    args = script.Args(env_id=GAMES[num_actions], device="cpu")
    bf16 = args.precision == "bf16"
    dtype, autocast = torch.bfloat16 if bf16 else torch.float32, torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # as the scripts do
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    obs = torch.randint(0, 256, (FRAMES, 84, 84, 4), dtype=torch.uint8)
    actions = torch.randint(0, num_actions, (ROWS,))
    z, next_z = torch.rand(2, ROWS, *agent.encode(obs[:1]).shape[1:])
    z.requires_grad_()

    def encoder(frames: int):
        with autocast:
            z = agent.encode(obs[:frames])
        z.sum().backward()

    noise = torch.randn(ROWS, *agent.transition_model.noise_shape, dtype=dtype)

    def transition():
        with autocast:
            loss = script.transition_loss(agent.transition_model(z, actions, noise), next_z).mean()
        loss.backward()

    def reward():
        with autocast:
            loss = script.reward_loss(agent.reward_model(z, actions), torch.zeros(ROWS)).mean()
        loss.backward()

    games = script.Games(args)
    games.reset()
    host_actions = torch.randint(0, num_actions, (64, args.num_envs))

    def environment():
        for t in range(64):
            games.step(host_actions[t])

    result = {
        "encoder_256_rows_s": timed(lambda: encoder(ROWS)),
        "encoder_288_frames_s": timed(lambda: encoder(FRAMES)),
        "transition_256_rows_s": timed(transition),
        "reward_256_rows_s": timed(reward),
        "environment_sps": 64 * args.num_envs / timed(environment, repeats=3),
    }
    matrix = torch.randn(2048, 2048, dtype=dtype)
    return result | {"matrix_flops_per_s": 2 * 2048**3 / timed(lambda: matrix @ matrix)}


def iteration_flops(script: str, num_actions: int) -> float:
    """Multiplications and additions that an iteration cannot do without, counted by hand.

    They are the policy's on 128 frames at 9 moments, and 16 updates: forward, and twice that backward, but for the
    first layer, whose input needs no gradient. What a form does beside that (spectral norms, picking kernels, moving
    patches) is its own affair. Raises KeyError for a script that is not counted.
    """
    convolutions = [20 * 20 * 32 * 256, 9 * 9 * 64 * 512, 7 * 7 * 64 * 576]
    heads = 3136 * 512 + 512 * num_actions + 512
    transition = 49 * 128 * 256 + 49 * 640 * 32 + 6272 * 5 + 3136 * 5  # of the taken action
    reward = 3136 * 256 + 256 * 256 + 256
    frame = 2 * (3 * sum(convolutions) - convolutions[0])
    rollout = 9 * 128 * 2 * (sum(convolutions) + heads)
    # SPR: frames once more, augmented; as targets without gradient; 1 to 5 steps ahead of a chunk's 8, with h, g, q.
    h, g, q = 49 * 64 * 9 * (64 + num_actions) + 49 * 64 * 9 * 64, 3136 * 512, 512 * 512
    ahead = ROWS // 8 * (8 + 7 + 6 + 5 + 4)
    spr = ROWS * frame + FRAMES * 2 * (sum(convolutions) + g) + ahead * 6 * (h + g + q)
    update = {
        "ppo_baseline": ROWS * (frame + 6 * heads),
        "deep_spi_ppo_atari": FRAMES * frame + ROWS * 6 * (heads + transition + reward),
        "spr_ppo_atari": ROWS * (frame + 6 * heads) + spr,
    }
    return rollout + MINIBATCHES * update[script]


def describe_machine() -> str:
    """Processor, cores, matrix units and versions, as one cell."""
    features = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)] or ["no bf16 units"]
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"{features['cpu_name']}, {os.cpu_count()} cores, {' '.join(units)}, {versions}"


# ---- Tables and picture


def values_by_case(results: Path) -> dict[tuple[str, str], list[float]]:
    """(case, measure) → its value in each round, in the order of the rounds."""
    values = defaultdict(list)
    for row in read_table(results / "throughput.csv"):
        values[row["case"], row["measure"]].append(float(row["value"]))
    return values


def ratio_table(results: Path, of: str = "") -> str:
    """Ratios of what one round measured: median over the rounds, smallest and largest. What was left out has no row.

    `of`: only the ratios in whose name this stands.
    """
    values, rows = values_by_case(results), []
    for label, (above, below) in ((label, sides) for label, sides in RATIOS.items() if of in label):
        pairs = zip(values[above], values[below], strict=False)  # a case may have been left out of every round
        ratios = np.array([first / second for first, second in pairs])
        if len(ratios):
            spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
            rows.append([label, f"{np.median(ratios):.2f}", spread, str(len(ratios))])
    return markdown(["ratio", "median", "smallest to largest", "pairs"], rows)


def speed_table(results: Path) -> str:
    """Steps per second, memory and overhead of each case, and the share of the roofline: medians over the rounds."""
    values, rows = values_by_case(results), []
    for case in dict.fromkeys(case for case, measure in values if measure == "sps"):
        sps, memory, overhead = (
            np.median(values[case, measure]) for measure in ("sps", "peak_memory_gb", "overhead_s")
        )
        name, _, num_actions = case.partition(" A=")
        work = f"{iteration_flops(name, int(num_actions)) / 1e9:.0f}" if name in COUNTED else ""
        share = roofline_share(values, case, sps)
        rows.append([case, f"{sps:.0f}", f"{memory:.2f}", f"{overhead:.1f}", work, share])
    header = ["case", "steps/s", "peak memory, GB", "overhead, s", "GFLOP an iteration", "of the roofline"]
    return markdown(header, rows)


def roofline_share(values: dict, case: str, sps: float) -> str:
    """Time of an iteration's multiplications at the matrix peak plus the environment's own, over the time it takes."""
    name, _, num_actions = case.partition(" A=")
    if name not in COUNTED:
        return ""
    matrix, environment = (
        np.median(values[f"stages A={num_actions}", measure]) for measure in ("matrix_flops_per_s", "environment_sps")
    )
    bound = iteration_flops(name, int(num_actions)) / matrix + ITERATION / environment
    return f"{100 * bound / (ITERATION / sps):.0f} %"


def iteration_parts(values: dict, script: str, num_actions: int) -> dict[str, float]:
    """Seconds of an iteration's parts, medians over the rounds; the last is what is left of the whole, end to end."""
    stages, has_model = f"stages A={num_actions}", script == "deep_spi_ppo_atari"
    encoder = np.median(values[stages, "encoder_288_frames_s" if has_model else "encoder_256_rows_s"])
    parts = {
        "environment": ITERATION / np.median(values[stages, "environment_sps"]),
        "encoder, 16 updates": MINIBATCHES * encoder,
    }
    if has_model:
        parts["P̄ and ℓ_P"] = MINIBATCHES * np.median(values[stages, "transition_256_rows_s"])
        parts["R̄ and ℓ_R"] = MINIBATCHES * np.median(values[stages, "reward_256_rows_s"])
    whole = ITERATION / np.median(values[f"{script} A={num_actions}", "sps"])
    return parts | {"all else": whole - sum(parts.values())}


def draw(results: Path) -> None:
    """Where an iteration of Deep SPI and of PPO goes, in seconds, for 4, 6 and 18 actions where they were measured."""
    values = values_by_case(results)
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    labels = []
    for script in ("deep_spi_ppo_atari", "ppo_baseline"):
        for num_actions in (18, 6, 4):
            if not values[f"{script} A={num_actions}", "sps"]:
                continue
            parts, left = iteration_parts(values, script, num_actions), 0.0
            for part, color in STAGES.items():
                axis.barh(len(labels), parts.get(part, 0), left=left, color=color, label=None if labels else part)
                left += parts.get(part, 0)
            axis.text(left, len(labels), f" {left:.2f} s", va="center", fontsize=9)
            labels.append(f"{script}.py, A = {num_actions}")
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel="seconds of an iteration (1,024 steps), end to end")
    axis.margins(x=0.1)
    figure.legend(loc="outside upper center", ncols=len(STAGES), fontsize=8)
    figure.savefig(results / "throughput.png", dpi=150, metadata={"Software": None})
    plt.close(figure)


# ---- The command


def main() -> None:
    """The command line; `learner` and `stages` are what it starts in processes of their own."""
    if sys.argv[1:2] == ["learner"]:
        learner(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["stages"]:
        print(json.dumps(stages(int(sys.argv[2]))))
    else:
        measure()


def measure() -> None:
    """Run the rounds and write the table after each, so that what was measured is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each case is run")
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()), metavar="NAME")
    parser.add_argument("--out", type=Path, default=TABLE, help="CSV file, written anew")
    parser.add_argument("--tables", action="store_true", help="no runs: tables and picture of the committed ones")
    arguments = parser.parse_args()
    if arguments.tables:
        print(ratio_table(RESULTS), speed_table(RESULTS), sep="\n\n")
        draw(RESULTS)
        return
    if arguments.out == TABLE and arguments.cases != list(cases()):
        parser.error("--cases: the committed table holds all of them; give another file with --out")
    machine, rows = describe_machine(), []
    for number in range(arguments.rounds):
        for name in arguments.cases if number % 2 == 0 else reversed(arguments.cases):
            result = run(cases()[name])
            rows += [{"round": number + 1, "case": name, "measure": m, "value": f"{v:.5g}"} for m, v in result.items()]
            print(f"round {number + 1}: {name}: {result['sps']:.0f} steps/s", flush=True)
        for num_actions in GAMES:
            done = subprocess.run(
                [sys.executable, "-m", "benchmark.throughput", "stages", str(num_actions)],
                cwd=ROOT, check=True, capture_output=True, text=True,
            )  # fmt: skip
            result = json.loads(done.stdout.splitlines()[-1])
            case = f"stages A={num_actions}"
            rows += [{"round": number + 1, "case": case, "measure": m, "value": f"{v:.5g}"} for m, v in result.items()]
        with open(arguments.out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "machine"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"machine": machine} for row in rows)
