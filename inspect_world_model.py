# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""What does the world model of a run know? python inspect_world_model.py runs/<run's folder>

Plays new games with a finished or an interrupted run, as `evaluate.py` does: with the run's own script, in its setting,
in float32 on the CPU. Writes RUN/inspection/index.html, one page with all its pictures, and the numbers as CSV:

    film              V, r against R̄, and ℓ_P over the steps of a game         rows.csv
    open loop         P̄ unrolled 1 to 15 steps, as nearest real frames         open_loop.csv, nearest.csv
    calibration       L_P, L_R where the policy is and where others would be    calibration.csv
    reward            R̄ against r                                              rewards.csv
    representation    |V(s1) - V(s2)| over d̄(z1, z2)                           pairs.csv, representation.csv
    neighbourhood     the ratios of the last update, and N^C                    ratios.csv, neighbourhood.csv

d̄ is smooth-L1, mean over the latent's numbers, for every script: so ℓ_P = d̄(z', z̄') is Deep SPI's transition loss over
the latent's size. Beside each loss stands what a trivial predictor pays. Resets count in no number.
"""

import base64
import contextlib
import csv
import functools
import html
import inspect
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple
from unittest import mock

import envpool
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from envpool.registration import registry
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from evaluate import check, load_config, load_state, make_agent, script_of, settings_of

HORIZON = 15  # steps that P̄ is unrolled
SHOWN = (0, 1, 2, 3, 5, 8, 11, 15)  # of them as pictures
BOUNDS = (1.1, 1.5, 3.0)  # C, the largest ratio of a perturbed policy
FILM = 128  # steps
NUM_PAIRS = 5_000
PICTURED = ("envpool.classic_control", "envpool.box2d")  # others have no pictures, or (MuJoCo) need OpenGL, or die
ENDS = ("", " low", " high")  # of the columns of a mean and its interval
BLUE, ORANGE, GREY = "#0b5fa5", "#d1700d", "#808080"


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    games: int = 16
    """N, games that are played side by side; intervals are over games"""
    steps: int = 512
    """T, steps of each game, the policy's own and each of the perturbed ones'"""
    seed: int = 1_000_000
    """seed of the environments and of every draw; another than the run's, to play games it has not seen"""
    script: Path | None = None
    """the training script, for a run whose folder has no copy of it"""


# ---- The model
# T steps, N games, B rows, A actions (or numbers in one), D numbers in the latent.


def distance(x: Tensor, y: Tensor) -> Tensor:
    """d̄, (B,): smooth-L1, mean over the latent's numbers, of latents (B, ...)."""
    return F.smooth_l1_loss(x.float(), y.float(), reduction="none").flatten(1).mean(-1)


class Model:
    """An agent's world model, whichever script it is of, under one name a part. `lacks` says what it has not."""

    def __init__(self, script: ModuleType, agent: torch.nn.Module, args: object, state: dict):
        P, self.script, self.agent, self.scaler, self.lacks = agent.transition_model, script, agent.eval(), None, []
        self.takes_noise = "noise" in inspect.signature(getattr(P, "forward", P)).parameters
        self.has_reward = hasattr(script, "reward_loss") and bool({"reward_model", "reward_decoder"} & set(dir(agent)))
        if not self.has_reward:
            self.lacks.append("The agent has no reward model: R̄, L_R and the table of rewards are left out.")
        elif hasattr(script, "RewardScaler") and "reward_scaler" not in state:
            self.has_reward = False
            self.lacks.append("R̄ predicts scaled rewards, but the scale was in checkpoint.pt, which is gone: no R̄.")
        elif hasattr(script, "RewardScaler"):
            self.scaler = script.RewardScaler(args.num_envs, args.gamma)
            self.scaler.load_state_dict(state["reward_scaler"])
        if hasattr(agent, "reward_decoder"):
            self.lacks.append("The agent's R̄ reads the next latent instead of z and a: here P̄'s mean.")
        for name, part in (("reward_loss_coef", "R̄"), ("transition_loss_coef", "P̄")):
            if getattr(args, name, 1) == 0:
                self.lacks.append(f"{part} has learned nothing by itself: its weight in the run's loss was 0.")

    def next_z(self, z: Tensor, actions: Tensor, is_sampled: bool = False) -> Tensor:
        """P̄'s mean (of classes: the most probable), or a sample of it as in training: (B, ...), as z."""
        given = (z, actions)
        if self.takes_noise:
            shape = (len(z), *getattr(self.agent.transition_model, "noise_shape", z.shape[1:]))
            draw = getattr(self.script, "gumbel", lambda *shape: torch.randn(shape).clamp(-1, 1))
            given += (draw(*shape) if is_sampled else torch.zeros(shape),)
        predicted = self.agent.transition_model(*given)
        if isinstance(predicted, tuple):  # mean and standard deviation
            mean, std = predicted
            return mean + is_sampled * std * torch.randn_like(mean)
        return predicted

    def reward(self, z: Tensor, actions: Tensor) -> Tensor:
        """R̄, (B,)."""
        if hasattr(self.agent, "reward_model"):
            return self.agent.reward_model(z, actions)
        return self.agent.reward_decoder(self.next_z(z, actions)).float().squeeze(-1)

    def scaled(self, rewards: Tensor) -> Tensor:
        """Rewards (T, N) as R̄ was taught them. All called dummies, they leave the scaler's sums as they are."""
        every_one = torch.ones(len(rewards) + 1, rewards.shape[1], dtype=torch.bool)
        return self.scaler.scale(rewards, every_one) if self.scaler else rewards


def batched(function, *rows: Tensor, size: int = 512) -> Tensor:
    """The function of the rows, `size` of them at a time."""
    return torch.cat([function(*part) for part in zip(*(x.split(size) for x in rows), strict=True)])


# ---- Playing


def tilt(probs: Tensor, is_up: Tensor, bound: float) -> Tensor:
    """Ratios π'/π (N, A) of the policy that is as much for the actions `is_up` as ratios in [1/C, C] allow.

    Probability m moves from the others to them, in proportion: one of the two ratios is at its bound. [1/C, C] is part
    of N^C, as 1/C >= 2 - C.
    """
    p = (probs * is_up).sum(-1, keepdim=True).clamp(0, 1)
    m = torch.minimum(p * (bound - 1), (1 - p) * (1 - 1 / bound))
    return torch.where(is_up, 1 + m / p.clamp(min=1e-300), 1 - m / (1 - p).clamp(min=1e-300))


def act(policy: Tensor | tuple[Tensor, Tensor], push: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Actions of the policy that is tilted to where push (N, A) is positive; the probabilities before, and the ratios.

    policy: log-probabilities (N, A), or a normal's mean (N, A) and log_std (A,). Of a normal the two half-spaces are
    tilted that lie in the direction of push and against it: they have probability ½ each.
    """
    if isinstance(policy, Tensor):
        probs = policy.double().exp()
        ratios = tilt(probs, push > 0, bound)
        return torch.multinomial((probs * ratios).float(), num_samples=1).squeeze(-1), probs, ratios
    mean, log_std = policy
    probs = torch.full((len(mean), 2), 0.5, dtype=torch.float64)
    ratios = tilt(probs, torch.tensor([True, False]), bound)
    noise, is_up = torch.randn_like(mean), torch.rand(len(mean)) < (probs * ratios)[:, 0]
    sign = torch.where(((noise * push).sum(-1) > 0) == is_up, 1, -1)
    return mean + log_std.exp() * sign[:, None] * noise, probs, ratios


class Play(NamedTuple):
    """T steps of N games."""

    z: Tensor  # (T + 1, N, ...)
    values: Tensor  # (T + 1, N)
    actions: Tensor  # (T, N), or (T, N, A)
    rewards: Tensor  # (T, N) as R̄ was taught them
    mask: Tensor  # (T, N) True: a transition, False: a reset
    ratios: Tensor  # (T, N, A) of every action; of continuous ones of the two halves
    moved: Tensor  # (T, N) probability that is not where π has it
    pictures: np.ndarray  # (T + 1, N, h, w) or (..., 3) uint8


def bars(obs: Tensor) -> np.ndarray:
    """Pictures (T, N, 48, w) of observations (T, N, O): a bar for each input, between its least and its largest."""
    low, high = obs.flatten(0, 1).amin(0), obs.flatten(0, 1).amax(0)
    levels = ((obs - low) / (high - low).clamp(min=1e-8)).numpy()
    is_lit = levels[:, :, None] >= (np.arange(48)[::-1, None] / 48)
    return np.repeat(is_lit * np.uint8(200), max(1, 96 // obs.shape[-1]), axis=-1)


@torch.no_grad()
def record(model: Model, args: object, steps: int, bound: float = 1.0, centre: Tensor | float = 0.0) -> Play:
    """Play. With a bound C > 1 each game has a perturbed policy of its own, a function of its latent.

    Action a is pushed up where ⟨v, z - centre⟩ > 0, with a random v of this game and action, down elsewhere. So the
    push is the same whenever the state is: signs drawn anew at each step would average out.
    """
    torch.manual_seed(args.seed)
    is_pictured = registry.specs[args.env_id][0] in PICTURED and bound == 1
    pictured = mock.patch.object(envpool, "make", functools.partial(envpool.make, render_mode="rgb_array"))
    with pictured if is_pictured else contextlib.nullcontext():
        games = model.script.Games(args)
    agent, obs, is_last, v = model.agent, games.reset(), torch.zeros(args.num_envs, dtype=torch.bool), None
    seen, done = [], []  # of T + 1 observations, of T steps
    for t in range(steps + 1):
        z = agent.encode(obs)
        picture = obs[..., -1].clone() if obs.dtype == torch.uint8 else obs
        if is_pictured:
            frames = map(Image.fromarray, games.envs.render(np.arange(args.num_envs)))
            picture = torch.from_numpy(np.stack([frame.reduce(max(1, frame.width // 150)) for frame in frames]))
        is_normal = hasattr(agent, "policy")  # of continuous actions
        policy, values = (agent.policy(z), agent.value(obs)) if is_normal else agent.policy_and_value(z)
        seen.append((z, values, picture, is_last))
        if t == steps:
            break
        outputs = policy[0] if is_normal else policy
        v = torch.randn(*outputs.shape, z[0].numel()) if v is None else v
        actions, probs, ratios = act(policy, torch.einsum("nad,nd->na", v, (z - centre).flatten(1)), bound)
        obs, rewards, _, is_last, _ = games.step(actions)
        done.append((actions, rewards.float(), ratios, 0.5 * (probs * (ratios - 1).abs()).sum(-1)))
    z, values, pictures, is_last = map(torch.stack, zip(*seen, strict=True))
    actions, rewards, ratios, moved = map(torch.stack, zip(*done, strict=True))
    pictures = pictures.numpy() if pictures.dtype == torch.uint8 else bars(pictures)
    return Play(z, values, actions, model.scaled(rewards), ~is_last[:-1], ratios, moved, pictures)


# ---- Numbers


@torch.no_grad()
def losses(model: Model, play: Play) -> dict[str, np.ndarray]:
    """ℓ_P of P̄'s mean, of a sample, of z' = z; R̄, its ℓ_R and that of always 0: (T, N) each."""
    z, actions, next_z = (x.flatten(0, 1) for x in (play.z[:-1], play.actions, play.z[1:]))
    sample = functools.partial(model.next_z, is_sampled=True)
    found = {
        "transition_loss": distance(batched(model.next_z, z, actions), next_z),
        "transition_loss_sample": distance(batched(sample, z, actions), next_z),
        "transition_loss_copy": distance(z, next_z),
    }
    if model.has_reward:
        found["predicted_reward"] = predicted = batched(model.reward, z, actions)
        found["reward_loss"] = model.script.reward_loss(predicted, play.rewards.flatten())
        found["reward_loss_zero"] = model.script.reward_loss(0 * predicted, play.rewards.flatten())
    return {name: x.float().view(play.rewards.shape).numpy() for name, x in found.items()}


def interval(x: np.ndarray, mask: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean of x (T, N) where the mask is, and its 95 % interval: a bootstrap that draws whole games, as rows of a game
    are alike. NaN if there is no row."""
    sums, counts = np.where(mask, x, 0).sum(0, dtype=np.float64), mask.sum(0)
    if not counts.any():
        return (np.nan,) * 3
    drawn = np.random.default_rng(seed).integers(len(sums), size=(2_000, len(sums)))
    total = counts[drawn].sum(1)
    means = (sums[drawn].sum(1) / np.maximum(total, 1))[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(sums.sum() / counts.sum()), float(low), float(high)


@torch.no_grad()
def unroll(model: Model, play: Play) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]:
    """P̄ unrolled from every HORIZON-th step of each game, S·N starts, with the actions really taken.

    Returns the steps (S,) of the starts; errors (HORIZON, 3, S, N) of P̄, of copying z, of the mean latent; which of
    them count (HORIZON, S, N): a chain ends where its episode does; and the latents (S·N, ...) after 0 ... HORIZON.
    """
    steps = np.arange(0, len(play.rewards) - HORIZON + 1, HORIZON)
    mean, first = play.z[:-1][play.mask].mean(0, keepdim=True), play.z[steps].flatten(0, 1)
    errors, counts, chain, is_real = [], [], [first], torch.ones_like(play.mask[steps])
    for k in range(1, HORIZON + 1):
        chain.append(batched(model.next_z, chain[-1], play.actions[steps + k - 1].flatten(0, 1)))
        is_real = is_real & play.mask[steps + k - 1]
        true = play.z[steps + k].flatten(0, 1)
        of_predictors = [distance(x, true) for x in (chain[-1], first, mean.expand_as(true))]
        errors.append(torch.stack(of_predictors).view(3, *is_real.shape).numpy())
        counts.append(is_real)
    return steps, np.stack(errors), torch.stack(counts).numpy(), chain


def nearest(play: Play, z: Tensor, game: int) -> tuple[int, int, float]:
    """Step and game of the real observation, of any game but this one, whose latent is nearest to z; and its d̄."""
    distances = np.stack([distance(of_step, z.expand_as(of_step)).numpy() for of_step in play.z[:-1]])
    distances = np.where(play.mask.numpy() & (np.arange(distances.shape[1]) != game), distances, np.inf)
    t, i = np.unravel_index(distances.argmin(), distances.shape)
    return int(t), int(i), float(distances[t, i])


def reward_bins(rewards: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Names and members (B,) of groups of rewards (B,): each value, or, of more than 12, ranges between quantiles."""
    values = np.unique(rewards)
    if len(values) <= 12:
        return [(f"{value:g}", rewards == value) for value in values]
    edges = np.unique(np.quantile(rewards, (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)))
    groups = np.clip(np.searchsorted(edges, rewards, side="right") - 1, 0, len(edges) - 2)
    return [(f"{edges[i]:.3g} to {edges[i + 1]:.3g}", groups == i) for i in range(len(edges) - 1)]


def value_pairs(play: Play, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d̄(z1, z2), mean |z1 - z2| and |V(s1) - V(s2)| of random pairs: (B,) each."""
    z, values, rng = play.z[:-1][play.mask].flatten(1), play.values[:-1][play.mask], np.random.default_rng(seed)
    first = rng.integers(len(z), size=NUM_PAIRS)
    second = (first + rng.integers(1, max(2, len(z)), size=NUM_PAIRS)) % len(z)  # another
    absolute = batched(lambda x, y: (x - y).abs().mean(-1), z[first], z[second])
    of_pairs = (batched(distance, z[first], z[second]), absolute, (values[first] - values[second]).abs())
    return tuple(x.double().numpy() for x in of_pairs)


def smallest_slope(x: np.ndarray, y: np.ndarray) -> float:
    """The smallest K with y <= K x in 95 % of the pairs (B,)."""
    slopes = np.divide(y, x, out=np.where(y > 0, np.inf, 0.0), where=x > 0)
    return float(np.sort(slopes)[int(np.ceil(0.95 * len(slopes))) - 1])


def logged_ratios(run_dir: Path) -> tuple[dict, list[tuple[float, float, int]]]:
    """The newest `spi/` numbers, and the histogram `spi/ratios` as (low, high, count); empty if there is none."""
    events = EventAccumulator(str(run_dir), size_guidance={"histograms": 1, "scalars": 1})
    events.Reload()
    if "spi/ratios" not in events.Tags()["histograms"]:
        return {}, []
    event = events.Histograms("spi/ratios")[-1]
    names = [name for name in events.Tags()["scalars"] if name.startswith("spi/")]
    numbers = {"step": event.step} | {name.removeprefix("spi/"): events.Scalars(name)[-1].value for name in names}
    edges, counts = event.histogram_value.bucket_limit, event.histogram_value.bucket
    return numbers, [(low, high, int(n)) for low, high, n in zip(edges, edges[1:], counts[1:], strict=False) if n]


# ---- The page

STYLE = """body { font: 16px/1.5 sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0 } th, td { padding: .2em .6em; text-align: right }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } img { max-width: 100% }"""

TEXTS = {
    "Film: where is the model wrong?": """
V is the critic's value of a frame, R̄ the reward predicted for the action taken, r the true one. ℓ_P is the distance
d̄ of the next latent to P̄'s mean, 'copy' its distance to the present latent. Vertical lines: an episode ends. The
pictures: of each eighth of these steps the frame with the largest ℓ_P, in the chart a dot.""",
    "Open loop: what does the model see ahead?": f"""
From the latent of every {HORIZON}th step of every game, P̄'s mean is applied k times, with the actions really taken. The
error is d̄ of the result to the latent of the true frame k steps later; of 'copy' it is d̄ of the start's own latent to
that, of 'mean' d̄ of the mean latent of all these games. A chain ends where its episode does. 'Low' and 'high' are the
95 % interval over starts: a bootstrap that draws whole games, as starts of one game are alike.""",
    "Calibration: what does the model know where other policies lead?": """
C = 1 is the policy itself. For a larger C each game has a perturbed policy of its own: action a is pushed up in
states where ⟨v, z - mean latent⟩ > 0, with a random v for each game and action, and down in the others. As much
probability moves from the actions pushed down to those pushed up as leaves every ratio π'(a|s)/π(a|s) in [1/C, C],
which is part of N^C. Of continuous actions the half-space in that direction is pushed up, to ratio 2 - 1/C. 'Moved'
is the mean probability that moved: little, where the policy is sure of itself. The ratios are the least and the
largest met. 'Transitions' are those played. L_P, L_R are the means of ℓ_P and ℓ_R over them: L_P with P̄'s mean,
'L_P sample' with a sample of it as in training (the same where P̄ has no noise). 'Trivial' is what z' = z pays, or
always predicting the reward 0. 'Less trivial' is the difference: where it is below 0 the model knows more. Low and
high: the 95 % interval over games.""",
    "Reward: R̄ by true reward": """
Rewards as the learner sees them (on Atari their sign, on vectors scaled), of the policy's own transitions: for each
true reward, or for ranges of it, the count, the mean of r, the mean and the standard deviation of R̄.""",
    "Representation: do latents that are alike have like values?": """
Random pairs of observations of these games: |V(s1) - V(s2)| over d̄(z1, z2). K is the smallest number such that
|V(s1) - V(s2)| <= K d̄(z1, z2) in 95 % of the pairs: the line. Smooth-L1 is quadratic where latents differ by less than
1, so d̄ makes near pairs nearer and K larger: beside it the same with the mean absolute difference.""",
    "Neighbourhood: how far did the last update go?": """
Ratios π_new(a|s)/π_old(a|s) as the run logged them at its last checkpoint: in the minibatches of the last epoch, each
before its own step. N^C, with C = 1 + ε, lies between the two lines. In older runs the bins are
10 % wide. The share outside N^C is not counted in them, but is the run's own number, of its last iteration, as are the
others here.""",
}


class Page:
    """index.html as it grows, and the CSV files beside it."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title, self.body = folder, html.escape(title), [f"<h1>{html.escape(title)}</h1>"]
        folder.mkdir(exist_ok=True)

    def section(self, title: str) -> None:
        self.body.append(f"<h2>{html.escape(title)}</h2>")
        self.text(TEXTS[title])

    def text(self, text: str) -> None:
        self.body.append(f"<p>{html.escape(text.strip())}</p>")

    def table(self, name: str, header: Sequence[str], rows: list[Sequence], is_shown: bool = True) -> None:
        """Write name.csv; show it too, with 3 digits."""
        with open(self.folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        if is_shown:
            cells = [[f"<th>{html.escape(x)}</th>" for x in header]]
            for row in rows:
                cells.append([f"<td>{f'{x:z.3g}' if isinstance(x, float) else html.escape(str(x))}</td>" for x in row])
            lines = "\n".join(f"<tr>{''.join(line)}</tr>" for line in cells)
            self.body.append(f'<table id="{name}">\n{lines}\n</table>')

    def figure(self, figure: Figure, alt: str) -> None:
        figure.savefig(content := io.BytesIO(), format="png")
        data = base64.b64encode(content.getvalue()).decode()
        self.body.append(f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>')

    def write(self) -> Path:
        path = self.folder / "index.html"
        head = f'<meta charset="utf-8"><title>{self.title}</title><style>{STYLE}</style>'
        path.write_text("\n".join((f'<!DOCTYPE html>\n<html lang="en">{head}', *self.body, "</html>\n")), "utf-8")
        return path


def axes(figure: Figure, *place: int, **settings) -> object:
    """Axes without a box."""
    ax = figure.add_subplot(*place, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def grid(rows: list[list[tuple[np.ndarray, str]]]) -> Figure:
    """Rows of eight pictures, each with a title, as one picture: 32 axes take a second to lay out."""
    w = rows[0][0][0].shape[1]
    edge, top = w // 16 + 1, w // 6 + 1
    margins = ((top, 0), (edge, edge), (0, 0))
    framed = [[np.pad(np.atleast_3d(x), margins, constant_values=255) for x, _ in row] for row in rows]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in framed])
    figure = Figure(figsize=(9, 9 * len(whole) / whole.shape[1]))
    ax = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
    ax.imshow(whole, cmap="gray", vmin=0, vmax=255)
    height, width = len(whole) / len(rows), whole.shape[1] / 8
    for y, row in enumerate(rows):
        for x, (_, title) in enumerate(row):
            ax.text((x + 0.5) * width, y * height + 0.9 * top, title, fontsize=8, ha="center", va="bottom")
    return figure


def compare(ax: object, x: list, rows: list[tuple], column_of: dict[str, int]) -> None:
    """Points with intervals, of rows that have a mean, its low and its high from each label's column on."""
    for (label, column), colour in zip(column_of.items(), (BLUE, ORANGE, GREY), strict=False):
        mean, low, high = np.array([row[column : column + 3] for row in rows]).T
        ax.errorbar(x, mean, (mean - low, high - mean), fmt="o-", ms=3, lw=1, color=colour, label=label)
    ax.legend(frameon=False, fontsize=8)


def film(page: Page, play: Play, found: dict[str, np.ndarray]) -> None:
    """The stretch of steps where P̄ errs most, as a chart, and its worst frames."""
    length, starts = min(FILM, len(play.mask)), range(0, max(1, len(play.mask) - FILM + 1), FILM // 2)
    loss = np.where(play.mask, found["transition_loss"], 0)
    totals = np.stack([loss[t : t + length].sum(0) for t in starts])
    which, game = np.unravel_index(totals.argmax(), totals.shape)
    steps = starts[which] + np.arange(length)
    worst = steps[[part[loss[part, game].argmax()] for part in np.array_split(steps, 8)] - steps[0]]
    page.text(f"Game {game}, steps {steps[0]} to {steps[-1]}: of all such stretches that with the largest sum of ℓ_P.")

    lines = [(0, "V", BLUE, play.values[:-1]), (1, "r", GREY, play.rewards)]
    lines += [(1, "R̄", BLUE, found["predicted_reward"])] if "predicted_reward" in found else []
    lines += [(2, "copy", ORANGE, found["transition_loss_copy"]), (2, "ℓ_P", BLUE, found["transition_loss"])]
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = [axes(figure, 3, 1, i, xlim=(steps[0], steps[-1])) for i in (1, 2, 3)]
    for panel, label, colour, x in lines:
        real = np.where(play.mask, x, np.nan)[steps, game]
        panels[panel].plot(steps, real, color=colour, lw=1, label=label)
    for ax in panels:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for t in steps[~play.mask[steps, game].numpy()]:
            ax.axvline(t, color=GREY, lw=0.8)
    panels[2].plot(worst, loss[worst, game], "o", color=BLUE, ms=4)
    panels[2].set(yscale="log", xlabel="step")
    strip = grid([[(play.pictures[t, game], f"step {t}: {loss[t, game]:.2g}") for t in worst]])
    page.figure(strip, "frames with the largest transition losses")
    page.figure(figure, "V, reward and transition loss over the steps")


def open_loop(page: Page, model: Model, play: Play, seed: int) -> None:
    """P̄ unrolled: error over k, and pictures."""
    steps, errors, counts, chain = unroll(model, play)
    rows = []
    for k in (k for k in range(1, HORIZON + 1) if counts[k - 1].any()):
        triples = [interval(x, counts[k - 1], seed) for x in errors[k - 1]]
        rows.append((k, int(counts[k - 1].sum()), *itertools.chain(*triples)))
    page.table("open_loop", ["k", "starts", *(x + end for x in ("P̄", "copy", "mean") for end in ENDS)], rows)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = axes(figure, xlabel="k", ylabel="d̄ to the true latent", yscale="log")
    compare(ax, [row[0] for row in rows], rows, {"P̄": 2, "copy": 5, "mean": 8})
    page.figure(figure, "error over k")

    whole, found = np.argwhere(counts[-1]), []
    page.text(
        f"Three of the {len(whole)} whole chains, evenly spaced. Above the true frame; in the middle the frame of "
        "another game whose latent is nearest to the predicted one, and its d̄ to it; below the one that is nearest to "
        "the true latent: the best that could be shown."
    )
    for s, game in whole[[len(whole) * i // 6 for i in (1, 3, 5)]] if len(whole) else ():
        shown = [[], [], []]
        for k in SHOWN:
            at, latent = (steps[s] + k, game), chain[k].unflatten(0, counts.shape[1:])[s, game]
            predicted, best = nearest(play, latent, game), nearest(play, play.z[at], game)
            found.append((int(game), int(steps[s]), k, *predicted, *best))
            shown[0].append((play.pictures[at], f"k = {k}"))
            shown[1].append((play.pictures[predicted[:2]], f"P̄: {predicted[2]:.2g}"))
            shown[2].append((play.pictures[best[:2]], f"best: {best[2]:.2g}"))
        page.text(f"Game {game}, from step {steps[s]}:")
        page.figure(grid(shown), "true frames, nearest to the prediction, nearest to the truth")
    columns = [f"{x} of {who}" for who in ("P̄", "best") for x in ("step", "game", "d̄")]
    page.table("nearest", ["game", "start", "k", *columns], found, is_shown=False)


def calibration(page: Page, model: Model, args: object, play: Play, found: dict[str, np.ndarray]) -> None:
    """Losses on the policy's own data, and on data of perturbed ones."""
    centre, rows = play.z[:-1][play.mask].mean(0), []
    kinds = {"L_P": ("transition_loss", "transition_loss_copy")}
    kinds["L_P sample"] = ("transition_loss_sample", "transition_loss_copy")
    if model.has_reward:
        kinds["L_R"] = ("reward_loss", "reward_loss_zero")
    policies = []
    for bound in (1.0, *BOUNDS):
        if bound > 1:
            play = record(model, args, len(play.rewards), bound, centre)
            found = losses(model, play)
        ratios, moved, mask = play.ratios[play.mask], play.moved[play.mask], play.mask.numpy()
        policies.append((bound, len(moved), ratios.min().item(), ratios.max().item(), moved.mean().item()))
        for name, (loss, trivial) in kinds.items():
            of_three = (found[loss], found[trivial], found[loss] - found[trivial])
            triples = [interval(x, mask, args.seed) for x in of_three]
            rows.append((name, bound, *itertools.chain(*triples)))
    page.table("policies", ["C", "transitions", "least ratio", "largest ratio", "moved"], policies)
    names = [x + end for x in ("mean", "trivial", "less trivial") for end in ENDS]
    page.table("calibration", ["loss", "C", *names], sorted(rows, key=lambda row: list(kinds).index(row[0])))
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for i, name in enumerate(kinds):
        of_kind = [row for row in rows if row[0] == name]
        ax = axes(figure, 1, len(kinds), i + 1, title=name, yscale="linear" if name == "L_R" else "log")
        compare(ax, [f"C = {row[1]:g}" for row in of_kind], of_kind, {"model": 2, "trivial": 5})
    page.figure(figure, "losses over the bound C")


def reward(page: Page, play: Play, found: dict[str, np.ndarray]) -> None:
    """R̄ by true reward."""
    mask, rows = play.mask.numpy(), []
    true, predicted = (x[mask].astype(np.float64) for x in (play.rewards.numpy(), found["predicted_reward"]))
    for name, members in reward_bins(true):
        r, guess = true[members], predicted[members]
        rows.append((name, len(r), float(r.mean()), float(guess.mean()), float(guess.std())))
    page.table("rewards", ["reward", "transitions", "mean r", "mean R̄", "std R̄"], rows)


def representation(page: Page, play: Play, seed: int) -> None:
    """|ΔV| over the distance of the latents."""
    names = ("d̄(z1, z2)", "mean |z1 - z2|", "|V(s1) - V(s2)|")
    *distances, difference = columns = value_pairs(play, seed)
    page.table("pairs", names, np.stack(columns, axis=1).tolist(), is_shown=False)
    figure, rows = Figure(figsize=(9, 3.4), layout="constrained"), []
    for i, (name, d) in enumerate(zip(names, distances, strict=False)):
        K = smallest_slope(d, difference)
        rows.append((name, len(d), K, float(d.mean()), float(difference.mean())))
        ax = axes(figure, 1, 2, i + 1, xlabel=name, ylabel=names[2])
        ax.plot(d, difference, ".", ms=3, alpha=0.3, color=BLUE)
        if np.isfinite(K):
            ax.plot((0, d.max()), (0, K * d.max()), color=ORANGE)
        ax.set_xlim(0), ax.set_ylim(0, difference.max() * 1.05 + 1e-9)
    page.table("representation", ("distance", "pairs", "K", "mean distance", f"mean {names[2]}"), rows)
    page.figure(figure, "value difference over latent distance")


def neighbourhood(page: Page, run_dir: Path, clip_coef: float) -> None:
    """The logged ratios, with N^C."""
    numbers, bins = logged_ratios(run_dir)
    if not bins:
        page.text("This run has no such histogram: no TensorBoard events, or no checkpoint yet.")
        return
    page.table("neighbourhood", ["of the run", "value"], [*numbers.items(), ("C", 1 + clip_coef)])
    page.table("ratios", ["from", "to", "ratios"], bins, is_shown=False)
    low, high, count = np.array(bins).T
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = axes(figure, xlabel="ratio", ylabel="ratios, over the bin's width")
    ax.bar(low, count / (high - low), high - low, align="edge", color=BLUE)
    for edge in (1 - clip_coef, 1 + clip_coef):
        ax.axvline(edge, color=ORANGE)
    page.figure(figure, "histogram of the ratios")


def main(own: Args) -> None:
    """Inspect the run."""
    check(2 <= own.games <= 256, "--games", own.games, "must lie in [2, 256]")
    check(HORIZON <= own.steps <= 10_000, "--steps", own.steps, f"must lie in [{HORIZON}, 10,000]")
    check(own.games * own.steps <= 65_536, "--steps", own.steps, "games times steps must be at most 65,536: memory")
    check(0 <= own.seed < 2**63, "--seed", own.seed, "must lie in [0, 2^63)")
    config, state = load_config(own.run), load_state(own.run)
    script = script_of(own.run, config, own.script)
    args = settings_of(script, config, own.seed, own.games)
    agent = make_agent(script, args, script.Games(args), state["agent"])
    check(hasattr(agent, "transition_model"), "run", own.run, f"{config['script']}'s agent has no world model")
    model = Model(script, agent, args, state)
    play = record(model, args, own.steps)
    found = losses(model, play)

    page = Page(own.run / "inspection", f"What the world model knows: {args.env_id}, {config['script']}")
    steps = state.get("iterations", 0) * config["args"]["num_envs"] * config["args"]["num_steps"]
    page.text(
        f"Run {own.run.resolve().name}, {f'after {steps} steps' if steps else 'final weights'}. {own.games} new games "
        f"of {own.steps} steps (seed {own.seed}), actions sampled from the policy, float32 on the CPU: "
        f"{play.mask.sum()} transitions. The latent has {play.z[0, 0].numel()} numbers; d̄ and ℓ_P are smooth-L1, mean "
        "over them."
    )
    for line in model.lacks:
        page.text(line)
    sections = {film: (play, found), open_loop: (model, play, own.seed), calibration: (model, args, play, found)}
    sections |= {reward: (play, found), representation: (play, own.seed), neighbourhood: (own.run, args.clip_coef)}
    for title, (section, given) in zip(TEXTS, sections.items(), strict=True):
        if section is not reward or model.has_reward:
            page.section(title)
            section(page, *given)
    columns = {"value": play.values[:-1].numpy(), "reward": play.rewards.numpy(), **found}
    rows = [(int(i), int(t), *(float(x[t, i]) for x in columns.values())) for t, i in np.argwhere(play.mask.numpy())]
    page.table("rows", ["game", "step", *columns], rows, is_shown=False)
    print(f"{page.write()}: open it in a browser")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # in any locale: Greek letters, paths
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}")
