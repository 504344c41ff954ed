"""The suites, as data: which algorithms on which tasks, for how many steps and seeds.

To add an algorithm, add an entry to a suite's `algorithms`, or name it on the command line (`benchmark/README.md`).
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Algorithm:
    """A script, relative to the repository or absolute, and the flags that make it this algorithm."""

    script: str
    flags: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An environment, its length in agent steps, and the flags that make it this task."""

    env_id: str
    total_timesteps: int
    flags: dict[str, object] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """The task's name, and that of its folder: the environment's, with the variant if there is one."""
        name = self.env_id.replace("/", "-")  # one folder, not two
        return f"{name}-{self.variant}" if self.variant else name


@dataclass(frozen=True)
class Suite:
    """All algorithms on all tasks, with seeds 1 to `seeds`; in the end each final policy plays `evaluate` new games."""

    algorithms: dict[str, Algorithm]
    tasks: list[Task]
    seeds: int
    evaluate: int = 64


# ---- Algorithms

PPO_FLAGS = {"reward_loss_coef": 0.0, "transition_loss_coef": 0.0}  # with both 0, deep_spi_ppo.py is PPO

VECTOR = {
    "ppo": Algorithm("deep_spi_ppo.py", PPO_FLAGS),
    "additive": Algorithm("deep_spi_ppo.py", {"loss_placement": "additive"}),
    "deep_spi": Algorithm("deep_spi_ppo.py"),
}
PLANNING = {"dream_spi": Algorithm("dream_spi.py")}

ATARI = {
    "ppo": Algorithm("ppo_baseline.py"),
    "deepmdp": Algorithm("deepmdp_ppo_atari.py"),
    "deep_spi": Algorithm("deep_spi_ppo_atari.py"),
    "dream_spi": Algorithm("dream_spi_atari.py"),
}

# What a world model's losses beside them are, by their kind and by their place: beside the clip, or in the utility.
AUXILIARY = {
    "ppo": ATARI["ppo"],
    "deepmdp": ATARI["deepmdp"],  # beside the clip, as published; in the utility it would be deep_spi
    "deep_spi": ATARI["deep_spi"],
    "additive": Algorithm("deep_spi_ppo_atari.py", {"loss_placement": "additive"}),
    # SPR and DBC also change φ: their own networks without the loss are what tells the loss's part.
    "spr-none": Algorithm("spr_ppo_atari.py", {"spr_loss_coef": 0.0}),
    "spr": Algorithm("spr_ppo_atari.py"),
    "spr-utility": Algorithm("spr_ppo_atari.py", {"loss_placement": "utility"}),
    "dbc-none": Algorithm("dbc_ppo_atari.py", {"dbc_loss_coef": 0.0}),
    "dbc": Algorithm("dbc_ppo_atari.py"),
    "dbc-utility": Algorithm("dbc_ppo_atari.py", {"loss_placement": "utility"}),
}

CONTINUOUS = {
    "ppo": Algorithm("deep_spi_ppo_continuous.py", PPO_FLAGS),
    "additive": Algorithm("deep_spi_ppo_continuous.py", {"loss_placement": "additive"}),
    "deep_spi": Algorithm("deep_spi_ppo_continuous.py"),
    "sb3": Algorithm("benchmark/peers/sb3_ppo_continuous.py"),
}

# How far the actor may move in one update of DreamSPI (0.01 is 1/γ - 1, the planning theorem's), and how far it plans.
CLIPS, HORIZONS = (0.01, 0.1, 0.3), (1, 4, 8, 15)
CLIP_BY_HORIZON = {
    f"clip{clip:g}-h{horizon}": Algorithm("dream_spi.py", {"imagination_clip_coef": clip, "horizon": horizon})
    for clip in CLIPS
    for horizon in HORIZONS
}

# N environments x T steps with the same N·T = 1024 per update. Each T is a multiple of the default chunk of 8, and each
# rollout has 128 chunks, which the default 4 minibatches (on vectors 8) divide.
SHAPES = {"8x128": (8, 128), "32x32": (32, 32), "128x8": (128, 8)}

PARALLELISM = {
    f"{name}-{shape}": Algorithm(ATARI[name].script, {"num_envs": num_envs, "num_steps": num_steps})
    for name in ("ppo", "deep_spi")
    for shape, (num_envs, num_steps) in SHAPES.items()
}

# The same shapes, with what their rollouts cover; on Atari with a step size that falls as over the paper's 10 M steps.
LUNAR_SHAPES = {
    f"{name}-{shape}": Algorithm(
        "benchmark/peers/deep_spi_ppo_coverage.py", flags | {"num_envs": num_envs, "num_steps": num_steps}
    )
    for name, flags in (("ppo", PPO_FLAGS), ("deep_spi", {}))
    for shape, (num_envs, num_steps) in SHAPES.items()
}
PONG_SHAPES = {
    name: Algorithm("benchmark/peers/deep_spi_ppo_atari_coverage.py", algorithm.flags)
    for name, algorithm in LUNAR_SHAPES.items()
    if "32x32" not in name
}
# The paper's stochastic setting, and the one without.
STOCHASTICITY = {"sticky": {}, "plain": {"repeat_action_probability": 0.0, "noop_max": 30}}

# What the published code does otherwise than DreamSPI here, one thing at a time, and all together.
PUBLISHED_WAYS = ("stale_gradients", "learned_dummies", "lost_dones", "final_limits")
PUBLISHED_PLANNING = {
    "dream_spi": PLANNING["dream_spi"],
    **{
        name.replace("_", "-"): Algorithm("benchmark/peers/dream_spi_published.py", {name: True})
        for name in PUBLISHED_WAYS
    },
    "published": Algorithm("benchmark/peers/dream_spi_published.py", dict.fromkeys(PUBLISHED_WAYS, True)),
}

# The paper's figure 4, in its own configuration.
CORRIDORS = {
    "ppo": Algorithm("benchmark/peers/deep_spi_corridors.py", PPO_FLAGS),
    "additive": Algorithm("benchmark/peers/deep_spi_corridors.py", {"loss_placement": "additive"}),
    "deep_spi": Algorithm("benchmark/peers/deep_spi_corridors.py"),
    "published-norm": Algorithm("benchmark/peers/deep_spi_corridors.py", {"published_norm": True}),
    "learned-dummies": Algorithm("benchmark/peers/deep_spi_corridors.py", {"learned_dummies": True}),
}

# Where is the figure, if not there? One change or two, as flags (PROTOCOL.md).
CORRIDORS_SEARCH = {
    **{f"eps{epsilon:g}": {"epsilon": epsilon} for epsilon in (0.1, 0.05, 0.02, 0.01)},
    **{f"n{n}": {"n_path": n} for n in (10, 20)},
    **{f"n{n}-eps{eps:g}": {"n_path": n, "epsilon": eps} for n, eps in ((10, 0.05), (20, 0.05), (20, 0.01))},
    "lr0.001": {"learning_rate": 1e-3},
    "lr0.001-clip0.4": {"learning_rate": 1e-3, "clip_coef": 0.4},
    "no-entropy": {"ent_coef": 0.0},
}

LONG = {name: AUXILIARY[name] for name in ("ppo", "deep_spi", "additive", "deepmdp")}

ABLATION = {
    "deep_spi": Algorithm("deep_spi_ppo_atari.py"),
    "additive": Algorithm("deep_spi_ppo_atari.py", {"loss_placement": "additive"}),
    "published-norm": Algorithm("benchmark/peers/deep_spi_published_norm.py"),
    "chunk-1": Algorithm("deep_spi_ppo_atari.py", {"chunk_length": 1}),
}

# Can P̄ learn? Each arm changes one thing of the published settings, and the last two of them (PROTOCOL.md).
TRANSITION_ARMS = {
    "deep_spi": {},
    "alpha-x10": {"transition_loss_coef": 0.005},
    "alpha-x100": {"transition_loss_coef": 0.05},
    "small-scale": {"transition_scale": 0.01},
    "residual": {"transition_residual": True},
    "residual-small": {"transition_residual": True, "transition_scale": 0.01},
}


def transition_arms(script: str) -> dict[str, Algorithm]:
    """The arms with a script; those with another P̄ with its peer."""
    peer = f"benchmark/peers/{Path(script).stem}_transition.py"
    own = {name: any(flag.startswith("transition_loss") for flag in flags) for name, flags in TRANSITION_ARMS.items()}
    return {
        name: Algorithm(script if own[name] or not flags else peer, flags) for name, flags in TRANSITION_ARMS.items()
    }


# The defaults against what they could be: precision, chunks, and the peer that a user would pick; and DeepMDP.
EARLY = {
    "ppo": Algorithm("ppo_baseline.py", {"precision": "bf16"}),
    "ppo-fp32": Algorithm("ppo_baseline.py", {"precision": "fp32"}),
    "deep_spi": Algorithm("deep_spi_ppo_atari.py", {"precision": "bf16"}),
    "deep_spi-chunk-1": Algorithm("deep_spi_ppo_atari.py", {"precision": "bf16", "chunk_length": 1}),
    "deepmdp": Algorithm("deepmdp_ppo_atari.py", {"precision": "bf16"}),
    "sb3": Algorithm("benchmark/peers/sb3_ppo.py"),
}

# ---- Tasks

CONTROL_STEPS = {"CartPole-v1": 200_000, "Acrobot-v1": 200_000, "LunarLander-v3": 1_500_000}
# Mean return of a run's last 100 games that counts as solved: gymnasium's, kept for sticky actions, which have none.
SOLVED_AT = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "LunarLander-v3": 200.0}
# Mean return of a player of uniformly random actions in 1,000 games of the vector script's `Games`, without sticky
# actions (standard errors 0.4, 0.3, 3.5). A normalised score has 0 there, and 1 where the task is solved.
RANDOM_PLAYER = {"CartPole-v1": 22.6, "Acrobot-v1": -499.2, "LunarLander-v3": -184.6}
ATARI_STEPS = 10_000_000  # the paper's

CONTROL_TASKS = [
    Task(env_id, steps, flags, variant)
    for env_id, steps in CONTROL_STEPS.items()
    for flags, variant in (({}, ""), ({"sticky": 0.25}, "sticky0.25"))
]

# Where the authors' PPO plays better than the human tester, in the stochastic setting (report/atari57_scores.csv). The
# five of them that suite `pilot` shows to be learned earliest, by the human-normalised return of its final policies in
# 64 new games (`evaluate.py RUN --episodes 64 --policy sampled`), are the games of `atari5`, `parallelism`, `ablation`.
# The rule was fixed before the runs, which are in results/suites/pilot.
PILOT_GAMES = [
    "Assault",
    "Atlantis",
    "Boxing",
    "CrazyClimber",
    "Defender",
    "Gopher",
    "Krull",
    "RoadRunner",
    "VideoPinball",
]

ATARI5_GAMES = ["Assault", "Atlantis", "Krull", "RoadRunner", "VideoPinball"]

ATARI57_GAMES = """
    Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling Boxing Breakout
    Centipede ChopperCommand CrazyClimber Defender DemonAttack DoubleDunk Enduro FishingDerby Freeway Frostbite Gopher
    Gravitar Hero IceHockey Jamesbond Kangaroo Krull KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix
    Pitfall Pong PrivateEye Qbert Riverraid RoadRunner Robotank Seaquest Skiing Solaris SpaceInvaders StarGunner
    Surround Tennis TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge Zaxxon
""".split()  # noqa: SIM905 - a list of 57 would take 57 lines


def atari_tasks(games: list[str]) -> list[Task]:
    """The games in the paper's stochastic setting, which is the scripts' default."""
    return [Task(f"{game}-v5", ATARI_STEPS) for game in games]


LONG_TASKS = [Task("Pong-v5", 4_000_000), Task("Breakout-v5", 4_000_000)]
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d")

# ---- Suites

SUITES = {
    "smoke": Suite(VECTOR, [Task("CartPole-v1", 40_960)], seeds=2, evaluate=8),
    "control": Suite(VECTOR | PLANNING, CONTROL_TASKS, seeds=10),
    "pilot": Suite({"ppo": ATARI["ppo"]}, [Task(f"{game}-v5", 200_000) for game in PILOT_GAMES], seeds=1),
    "atari5": Suite(ATARI, atari_tasks(ATARI5_GAMES), seeds=5),
    "atari57": Suite(ATARI, atari_tasks(ATARI57_GAMES), seeds=5),
    "parallelism": Suite(PARALLELISM, atari_tasks(ATARI5_GAMES), seeds=5),
    "early": Suite(EARLY, [Task("Krull-v5", 300_000)], seeds=3),
    "gated": Suite({"gated": Algorithm("deep_spi_ppo.py", {"loss_placement": "gated"})}, CONTROL_TASKS, seeds=10),
    "transition": Suite(
        transition_arms("deep_spi_ppo.py"), [Task("CartPole-v1", 200_000), Task("LunarLander-v3", 500_000)], seeds=5
    ),
    "transition-pong": Suite(transition_arms("deep_spi_ppo_atari.py"), [Task("Pong-v5", 200_000)], seeds=1),
    "transition-start": Suite(
        {"deep_spi": ATARI["deep_spi"]}, [Task("Pong-v5", 11_264), Task("Breakout-v5", 24_576)], seeds=3, evaluate=0
    ),
    "transition-long": Suite(
        {"deep_spi": VECTOR["deep_spi"]}, [Task("CartPole-v1", 1_000_000), Task("LunarLander-v3", 2_500_000)], seeds=1
    ),
    "planning": Suite(
        CLIP_BY_HORIZON, [Task("CartPole-v1", 200_000), Task("Acrobot-v1", 200_000)], seeds=5, evaluate=0
    ),
    "planning-longer": Suite(
        PLANNING | {"dream_spi-h15": Algorithm("dream_spi.py", {"horizon": 15})},
        [Task("CartPole-v1", 400_000), Task("Acrobot-v1", 400_000), Task("LunarLander-v3", 1_500_000)],
        seeds=5,
        evaluate=0,
    ),
    "planning-published": Suite(PUBLISHED_PLANNING, [Task("CartPole-v1", 200_000)], seeds=5, evaluate=0),
    "planning-atari": Suite(
        {"dream_spi": ATARI["dream_spi"]}, [Task("Pong-v5", 200_000), Task("Boxing-v5", 200_000)], seeds=1
    ),
    "long": Suite(LONG, LONG_TASKS, seeds=2),
    "auxiliary": Suite(AUXILIARY, [Task("Krull-v5", 300_000), *LONG_TASKS], seeds=3),
    "mujoco": Suite(CONTINUOUS, [Task(f"{name}-v4", 1_000_000) for name in MUJOCO], seeds=5),
    "corridors": Suite(CORRIDORS, [Task("Corridors-v0", 200_000)], seeds=10, evaluate=0),
    "corridors-search": Suite(
        {name: CORRIDORS[name] for name in ("ppo", "deep_spi")},
        [Task("Corridors-v0", 102_400, flags, variant) for variant, flags in CORRIDORS_SEARCH.items()],
        seeds=2,
        evaluate=0,
    ),
    "parallelism-lunar": Suite(
        LUNAR_SHAPES, [task for task in CONTROL_TASKS if task.label == "LunarLander-v3-sticky0.25"], seeds=5
    ),
    "parallelism-pong": Suite(
        PONG_SHAPES, [Task("Pong-v5", 1_500_000, flags, name) for name, flags in STOCHASTICITY.items()], seeds=2
    ),
    "ablation": Suite(ABLATION, atari_tasks(ATARI5_GAMES), seeds=5),
}

# ---- Cost

# Agent steps per second and the threads that took part, with default settings (DeepMDP: with 128 x 8), on an EPYC with
# bf16 units, which the default precision makes use of. Atari: results/throughput.csv, 18 actions, the slowest. Vectors:
# about the median of the 40 runs of LunarLander-v3 with a world model in results/suites/control, on a Xeon;
# of dream_spi.py about those of results/planning.csv.
MEASURED_SPS = {
    "deep_spi_ppo.py": (7000, 1),
    "dream_spi.py": (5500, 1),
    "ppo_baseline.py": (1274, 2),
    "deepmdp_ppo_atari.py": (641, 2),
    "deep_spi_ppo_atari.py": (628, 2),
    "spr_ppo_atari.py": (356, 2),
    "dbc_ppo_atari.py": (1259, 2),
    "dream_spi_atari.py": (473, 2),
    "benchmark/peers/sb3_ppo.py": (685, 2),
}
PRICED_AS = {  # not measured themselves
    "benchmark/peers/deep_spi_published_norm.py": "deep_spi_ppo_atari.py",
    "benchmark/peers/deep_spi_ppo_atari_transition.py": "deep_spi_ppo_atari.py",
    "benchmark/peers/deep_spi_ppo_transition.py": "deep_spi_ppo.py",
    "benchmark/peers/deep_spi_ppo_coverage.py": "deep_spi_ppo.py",
    "benchmark/peers/deep_spi_ppo_atari_coverage.py": "deep_spi_ppo_atari.py",
    "benchmark/peers/dream_spi_published.py": "dream_spi.py",
}
