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
import sys
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
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from evaluate import check, load_config, load_state, make_agent, script_of, settings_of

HORIZON = 15  # steps that P̄ is unrolled
SHOWN = (0, 1, 2, 3, 5, 8, 11, 15)  # of them as pictures
BOUNDS = (1.1, 1.5, 3.0)  # C, the largest ratio of a perturbed policy
FILM = 128  # steps
NUM_PAIRS = 5_000
PICTURED = ("envpool.classic_control", "envpool.box2d")  # others have no pictures, or (MuJoCo) need OpenGL, or die
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
        self.script, self.agent, self.lacks, self.scaler = script, agent.eval(), [], None
        P = agent.transition_model
        self.takes_noise = "noise" in inspect.signature(getattr(P, "forward", P)).parameters
        self.has_reward = hasattr(agent, "reward_model") or hasattr(agent, "reward_decoder")
        if not self.has_reward:
            self.lacks.append("It has no reward model: r, L_R and the table of rewards are left out.")
        elif hasattr(script, "RewardScaler") and "reward_scaler" not in state:
            self.has_reward = False
            self.lacks.append("R̄ predicts scaled rewards, and only checkpoint.pt has the scale: it is left out.")
        elif hasattr(script, "RewardScaler"):
            self.scaler = script.RewardScaler(args.num_envs, args.gamma)
            self.scaler.load_state_dict(state["reward_scaler"])
        if hasattr(agent, "reward_decoder"):
            self.lacks.append("Its R̄ reads the next latent, not z and a: here the mean of P̄.")
        for name, symbol in (("reward_loss_coef", "R̄"), ("transition_loss_coef", "P̄")):
            if getattr(args, name, 1) == 0:
                self.lacks.append(f"{symbol} was not trained: its weight in the run's loss is 0.")

    def next_z(self, z: Tensor, actions: Tensor, is_sampled: bool = False) -> Tensor:
        """P̄'s mean (of classes: the most probable), or a sample of it: (B, ...), as z."""
        noise = ()
        if self.takes_noise:
            shape = (len(z), *getattr(self.agent.transition_model, "noise_shape", z.shape[1:]))
            noise = (torch.zeros(shape),)
            if is_sampled:  # as in training
                gumbel = getattr(self.script, "gumbel", None)
                noise = (gumbel(*shape) if gumbel else torch.randn(shape).clamp(-1, 1),)
        predicted = self.agent.transition_model(z, actions, *noise)
        if isinstance(predicted, tuple):  # mean and standard deviation
            mean, std = predicted
            return mean + std * torch.randn_like(mean) if is_sampled else mean
        return predicted

    def reward(self, z: Tensor, actions: Tensor) -> Tensor:
        """R̄, (B,)."""
        if hasattr(self.agent, "reward_model"):
            return self.agent.reward_model(z, actions)
        return self.agent.reward_decoder(self.next_z(z, actions)).float().squeeze(-1)

    def scaled(self, rewards: Tensor) -> Tensor:
        """Rewards (T, N) as R̄ was taught them. Called dummies, they leave the scaler's sums as they are."""
        if self.scaler is None:
            return rewards
        return self.scaler.scale(rewards, torch.ones(len(rewards) + 1, rewards.shape[1], dtype=torch.bool))


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


class Play(NamedTuple):
    """T steps of N games."""

    z: Tensor  # (T + 1, N, ...)
    values: Tensor  # (T + 1, N)
    actions: Tensor  # (T, N), or (T, N, A)
    rewards: Tensor  # (T, N) as R̄ was taught them
    mask: np.ndarray  # (T, N) True: a transition, False: a reset
    ratios: Tensor  # (T, N, A) of every action; of continuous ones of the two halves
    moved: Tensor  # (T, N) probability that is not where π has it
    pictures: np.ndarray  # (T + 1, N, h, w) or (..., 3) uint8

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """z, a, z' of all T·N rows."""
        return self.z[:-1].flatten(0, 1), self.actions.flatten(0, 1), self.z[1:].flatten(0, 1)


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
    push is the same whenever the state is: signs drawn anew at each step would average out. Of continuous actions the
    half-space in the direction of these products is pushed up.
    """
    torch.manual_seed(args.seed)
    is_pictured = registry.specs[args.env_id][0] in PICTURED and bound == 1
    pictured = mock.patch.object(envpool, "make", functools.partial(envpool.make, render_mode="rgb_array"))
    with pictured if is_pictured else contextlib.nullcontext():
        games = model.script.Games(args)
    obs, is_last, v, agent = games.reset(), torch.zeros(args.num_envs, dtype=torch.bool), None, model.agent
    seen, done = [], []  # of T + 1 observations, of T steps
    for t in range(steps + 1):
        z = agent.encode(obs)
        picture = obs[..., -1] if obs.dtype == torch.uint8 else obs
        if is_pictured:
            frames = map(Image.fromarray, games.envs.render(np.arange(args.num_envs)))
            picture = torch.from_numpy(np.stack([frame.reduce(max(1, frame.width // 150)) for frame in frames]))
        if is_normal := hasattr(agent, "policy"):
            (mean, log_std), values = agent.policy(z), agent.value(obs)
        else:
            mean, values = agent.policy_and_value(z)
        seen.append((z, values, picture, is_last))
        if t == steps:
            break
        v = torch.randn(*mean.shape, z[0].numel()) if v is None else v
        push = torch.einsum("nad,nd->na", v, (z - centre).flatten(1))
        if is_normal:
            noise, probs = torch.randn_like(mean), torch.full((len(mean), 2), 0.5, dtype=torch.float64)
            ratios = tilt(probs, torch.tensor([True, False]), bound)
            is_wanted = torch.rand(len(mean)) < (probs * ratios)[:, 0]  # the upper half
            actions = (
                mean + log_std.exp() * torch.where(((noise * push).sum(-1) > 0) == is_wanted, 1, -1)[:, None] * noise
            )
        else:
            probs = mean.double().softmax(-1)
            ratios = tilt(probs, push > 0, bound)
            actions = torch.multinomial((probs * ratios).float(), num_samples=1).squeeze(-1)
        obs, rewards, _, next_is_last, _ = games.step(actions)
        moved = 0.5 * (probs * (ratios - 1).abs()).sum(-1)
        done.append((actions, rewards.float(), ratios, moved))
        is_last = next_is_last
    z, values, pictures, is_last = map(torch.stack, zip(*seen, strict=True))
    actions, rewards, ratios, moved = map(torch.stack, zip(*done, strict=True))
    pictures = pictures.numpy() if pictures.dtype == torch.uint8 else bars(pictures)
    return Play(z, values, actions, model.scaled(rewards), ~is_last[:-1].numpy(), ratios, moved, pictures)


# ---- Numbers


@torch.no_grad()
def losses(model: Model, play: Play) -> dict[str, np.ndarray]:
    """ℓ_P of P̄'s mean, of a sample, of z' = z; R̄, its ℓ_R and that of always 0: (T, N) each."""
    z, actions, next_z = play.rows()
    found = {
        "transition_loss": distance(batched(model.next_z, z, actions), next_z),
        "transition_loss_sample": distance(
            batched(functools.partial(model.next_z, is_sampled=True), z, actions), next_z
        ),
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
        return np.nan, np.nan, np.nan
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
    mean = play.z[:-1][torch.from_numpy(play.mask)].mean(0, keepdim=True)
    first = play.z[steps].flatten(0, 1)
    errors, counts, chain, is_real = [], [], [first], np.ones((len(steps), play.mask.shape[1]), dtype=bool)
    for k in range(1, HORIZON + 1):
        chain.append(batched(model.next_z, chain[-1], play.actions[steps + k - 1].flatten(0, 1)))
        is_real = is_real & play.mask[steps + k - 1]
        true = play.z[steps + k].flatten(0, 1)
        of_predictors = [distance(x, true) for x in (chain[-1], first, mean.expand_as(true))]
        errors.append(torch.stack(of_predictors).view(3, *is_real.shape).numpy())
        counts.append(is_real)
    return steps, np.stack(errors), np.stack(counts), chain


def nearest(play: Play, z: Tensor, game: int) -> tuple[int, int, float]:
    """Step and game of the real observation, of any game but this one, whose latent is nearest to z; and its d̄."""
    far = np.array([[float("inf")]])
    distances = np.stack([distance(of_step, z.expand_as(of_step)).numpy() for of_step in play.z[:-1]])
    distances = np.where(play.mask & (np.arange(distances.shape[1]) != game), distances, far)
    t, i = np.unravel_index(distances.argmin(), distances.shape)
    return int(t), int(i), float(distances[t, i])


def reward_bins(rewards: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Names and members (B,) of groups of rewards (B,): each value, or if there are more than 12, ranges of quantiles."""
    values = np.unique(rewards)
    if len(values) <= 12:
        return [(f"{value:g}", rewards == value) for value in values]
    edges = np.unique(np.quantile(rewards, (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)))
    groups = np.clip(np.searchsorted(edges, rewards, side="right") - 1, 0, len(edges) - 2)
    return [(f"{edges[i]:.3g} to {edges[i + 1]:.3g}", groups == i) for i in range(len(edges) - 1)]


def value_pairs(play: Play, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """d̄(z1, z2) and |V(s1) - V(s2)| of random pairs, (B,) each; and the smallest K with |ΔV| <= K d̄ in 95 % of them."""
    mask = torch.from_numpy(play.mask)
    z, values = play.z[:-1][mask], play.values[:-1][mask]
    rng = np.random.default_rng(seed)
    first = rng.integers(len(z), size=NUM_PAIRS)
    second = (first + rng.integers(1, max(2, len(z)), size=NUM_PAIRS)) % len(z)  # another
    d = batched(distance, z[first], z[second]).double().numpy()
    difference = (values[first] - values[second]).abs().double().numpy()
    slopes = np.divide(difference, d, out=np.where(difference > 0, np.inf, 0.0), where=d > 0)
    return d, difference, float(np.sort(slopes)[int(np.ceil(0.95 * len(slopes))) - 1])


def logged_ratios(run_dir: Path) -> tuple[dict, list[tuple[float, float, float]]]:
    """The newest `spi/` numbers, and the histogram `spi/ratios` as (low, high, count); empty if there is none."""
    events = EventAccumulator(str(run_dir), size_guidance={"histograms": 1, "scalars": 1})
    events.Reload()
    if "spi/ratios" not in events.Tags()["histograms"]:
        return {}, []
    event = events.Histograms("spi/ratios")[-1]
    names = [name for name in events.Tags()["scalars"] if name.startswith("spi/")]
    numbers = {"step": event.step} | {name.removeprefix("spi/"): events.Scalars(name)[-1].value for name in names}
    edges, counts = event.histogram_value.bucket_limit, event.histogram_value.bucket
    return numbers, [(low, high, n) for low, high, n in zip(edges, edges[1:], counts[1:], strict=False) if n]


# ---- The page

STYLE = """body { font: 16px/1.5 sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px } th, td { padding: .2em .7em; text-align: right }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } th:first-child, td:first-child { text-align: left }
img { max-width: 100% } code { background: #f2f2f2 } .note { color: #8a4b00 }"""


def shown(x: object) -> str:
    """A number as the page has it."""
    return f"{x:z.3g}" if isinstance(x, float) else str(x)


class Page:
    """index.html as it grows, and the CSV files beside it."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title, self.body = folder, title, [f"<h1>{html.escape(title)}</h1>"]
        folder.mkdir(exist_ok=True)

    def heading(self, text: str) -> None:
        self.body.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self.body.append(f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>")

    def table(self, name: str, header: tuple[str, ...], rows: list[tuple], is_shown: bool = True) -> None:
        """Write name.csv; show it too."""
        with open(self.folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        if is_shown:
            lines = [[f"<th>{html.escape(x)}</th>" for x in header]]
            lines += [[f"<td>{html.escape(shown(x))}</td>" for x in row] for row in rows]
            lines = "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)
            self.body.append(f'<table id="{name}">\n{lines}\n</table>')

    def picture(self, content: bytes, alt: str, kind: str = "png") -> None:
        data = base64.b64encode(content).decode()
        self.body.append(f'<p><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}"></p>')

    def figure(self, figure: Figure, alt: str) -> None:
        figure.savefig(content := io.BytesIO(), format="png")
        self.picture(content.getvalue(), alt)

    def write(self) -> Path:
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        path = self.folder / "index.html"
        path.write_text(f'<!DOCTYPE html>\n<html lang="en">{head}\n' + "\n".join(self.body) + "\n</html>\n", "utf-8")
        return path


def axes(figure: Figure, *place: int, **settings) -> object:
    """Axes without a box."""
    ax = figure.add_subplot(*place, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def show_picture(ax: object, picture: np.ndarray, title: str = "") -> None:
    """A frame in a figure."""
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect="equal" if picture.shape[0] > 48 else "auto")
    ax.set_title(title, fontsize=8)
    ax.set_xticks([]), ax.set_yticks([])


def film(page: Page, play: Play, found: dict[str, np.ndarray]) -> None:
    """The stretch of steps where P̄ errs most: a chart, the frames at the eight largest ℓ_P, and all as a GIF."""
    length = min(FILM, len(play.mask))
    loss = np.where(play.mask, found["transition_loss"], np.nan)
    starts = range(0, len(loss) - length + 1, FILM // 2)
    totals = np.array([np.nansum(loss[t : t + length], axis=0) for t in starts])
    which, game = np.unravel_index(totals.argmax(), totals.shape)
    steps = np.arange(starts[which], starts[which] + length)
    page.text(
        f"Game {game}, steps {steps[0]} to {steps[-1]}: of all stretches of {length} steps, that with the largest sum "
        "of ℓ_P. V is the critic's value of the frame, R̄ the reward predicted of the action taken, r the true one, "
        "ℓ_P the distance d̄ of the next latent to P̄'s mean; 'copy' to the present latent. Grey lines: an episode ends."
    )

    def gap(x: np.ndarray) -> np.ndarray:
        return np.where(play.mask[steps, game], x[steps, game], np.nan)

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = [axes(figure, 3, 1, i) for i in (1, 2, 3)]
    panels[0].plot(steps, gap(play.values[:-1].numpy()), color=BLUE)
    panels[0].set_ylabel("V")
    panels[1].plot(steps, gap(play.rewards.numpy()), color=GREY, lw=1, label="r")
    if "predicted_reward" in found:
        panels[1].plot(steps, gap(found["predicted_reward"]), color=BLUE, label="R̄")
    panels[1].legend(frameon=False, loc="upper right", fontsize=8)
    panels[1].set_ylabel("reward")
    panels[2].plot(steps, gap(found["transition_loss_copy"]), color=ORANGE, lw=1, label="copy")
    panels[2].plot(steps, gap(loss), color=BLUE, label="ℓ_P")
    panels[2].legend(frameon=False, loc="upper right", fontsize=8)
    panels[2].set_ylabel("ℓ_P"), panels[2].set_xlabel("step")
    for ax in panels:
        ax.set_xlim(steps[0], steps[-1])
        for t in steps[~play.mask[steps, game]]:
            ax.axvline(t, color=GREY, lw=0.8)
    worst = sorted(np.argsort(-np.nan_to_num(gap(loss)), kind="stable")[:8])
    panels[2].plot(steps[worst], gap(loss)[worst], "o", color=BLUE, ms=4)
    page.figure(figure, "V, reward and transition loss over the steps")

    frames = play.pictures[steps, game]
    strip = Figure(figsize=(9, 1.7), layout="constrained")
    for i, t in enumerate(worst):
        show_picture(strip.add_subplot(1, 8, i + 1), frames[t], f"step {steps[t]}\nℓ_P {shown(float(gap(loss)[t]))}")
    page.text("The frames at the eight largest of these ℓ_P (dots above): here the model is most wrong.")
    page.figure(strip, "frames at the largest transition losses")

    figure.set_dpi(60)
    figure.savefig(content := io.BytesIO(), format="png", dpi=60)
    chart = Image.open(content).convert("RGB")
    height = 240
    movie = []
    for t, frame in zip(steps, frames, strict=True):
        frame = Image.fromarray(frame).convert("RGB")
        frame = frame.resize((frame.width * height // frame.height, height), Image.Resampling.NEAREST)
        picture = Image.new("RGB", (chart.width, chart.height + height), "white")
        picture.paste(frame, ((chart.width - frame.width) // 2, 0))
        picture.paste(chart, (0, height))
        x = panels[2].transData.transform((t, 0))[0]
        ImageDraw.Draw(picture).line((x, height, x, picture.height), fill="#d00000")
        movie.append(picture.quantize(48, dither=Image.Dither.NONE))
    movie[0].save(content := io.BytesIO(), "GIF", save_all=True, append_images=movie[1:], duration=120, loop=0)
    page.text("The same as a film.")
    page.picture(content.getvalue(), "film of the steps", "gif")


def open_loop(page: Page, model: Model, play: Play, seed: int) -> None:
    """P̄ unrolled: error over k, and pictures."""
    steps, errors, counts, chain = unroll(model, play)
    page.text(
        f"From the latent of every {HORIZON}th step of every game ({counts[0].sum()} starts) P̄'s mean is applied k "
        "times, with the actions really taken. Error: d̄ of the result to the latent of the true frame k steps later; of "
        "'copy' that of the start's own latent, of 'mean' that of the mean of all latents of these games. A chain ends "
        "where its episode ends. The interval is of 95 %, over starts, drawn game by game."
    )
    rows = []
    for k in range(1, HORIZON + 1):
        of_predictors = [interval(x, counts[k - 1], seed) for x in errors[k - 1]]
        if counts[k - 1].any():
            rows.append((k, int(counts[k - 1].sum()), *(x for triple in of_predictors for x in triple)))
    names = [f"{name}{end}" for name in ("P̄", "copy", "mean") for end in ("", " low", " high")]
    page.table("open_loop", ("k", "starts", *names), rows)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax, k = axes(figure), [row[0] for row in rows]
    for i, (name, colour) in enumerate((("P̄", BLUE), ("copy", ORANGE), ("mean", GREY))):
        value, low, high = ([row[2 + 3 * i + j] for row in rows] for j in range(3))
        ax.plot(k, value, color=colour, label=name)
        ax.fill_between(k, low, high, color=colour, alpha=0.2)
    ax.set_xlabel("k"), ax.set_ylabel("d̄ to the true latent"), ax.set_ylim(0), ax.legend(frameon=False)
    page.figure(figure, "error over k")

    whole = np.argwhere(counts[-1])
    if not len(whole):
        page.text(f"No episode lasts {HORIZON} steps from a start: no pictures.", "note")
        return
    page.text(
        "Three of these chains, evenly spaced. Above the true frame; in the middle the frame of another game whose "
        "latent is nearest to the predicted one; below that nearest to the true latent, the best there is to show."
    )
    found = []
    for s, game in whole[np.linspace(0, len(whole) - 1, 3).astype(int)]:
        figure = Figure(figsize=(9, 3.7), layout="constrained")
        for column, k in enumerate(SHOWN):
            t, start = steps[s] + k, s * counts.shape[2] + game
            predicted = nearest(play, chain[k][start][None], game)
            best = nearest(play, play.z[t, game][None], game)
            found.append((int(game), int(steps[s]), k, *predicted, *best))
            for row, (at, title) in enumerate((((t, game), f"k = {k}"), (predicted, "P̄"), (best, "best"))):
                title = title if row == 0 else f"{title}: {at[2]:.2g}"
                show_picture(
                    figure.add_subplot(3, len(SHOWN), row * len(SHOWN) + column + 1), play.pictures[at[:2]], title
                )
        page.text(f"Game {game}, from step {steps[s]}; under P̄ and 'best' their d̄ to the frame that is shown.")
        page.figure(figure, "true frame, nearest to the prediction, nearest to the truth")
    header = (
        "game",
        "start",
        "k",
        "step of P̄'s",
        "game of P̄'s",
        "d̄ of P̄'s",
        "step of best",
        "game of best",
        "d̄ of best",
    )
    page.table("nearest", header, found, is_shown=False)


def calibration(page: Page, model: Model, args: object, play: Play, found: dict[str, np.ndarray]) -> None:
    """Losses on the policy's own data, and on data of perturbed ones."""
    page.text(
        "C = 1 is the policy itself. For C > 1 each game has a perturbed policy of its own: action a is pushed up in "
        "states where ⟨v, z - mean latent⟩ > 0, with a random v for each game and action, and down in the others. As "
        "much probability moves from the actions pushed down to those pushed up as leaves all ratios π'(a|s)/π(a|s) in "
        "[1/C, C], which is part of N^C. Of continuous actions the half-space in that direction is pushed up. 'Moved' is "
        "the mean probability that moved: of a policy that is sure of itself little can. 'Transitions' are those "
        "played, resets left out; the ratios are the least and the largest met."
    )
    centre = play.z[:-1][torch.from_numpy(play.mask)].mean(0)
    kinds = [("L_P", "transition_loss", "transition_loss_copy")]
    kinds += [("L_P sample", "transition_loss_sample", "transition_loss_copy")]
    kinds += [("L_R", "reward_loss", "reward_loss_zero")] * model.has_reward
    policies, rows = [], []
    for bound in (1.0, *BOUNDS):
        if bound > 1:
            play = record(model, args, len(play.rewards), bound, centre)
            found = losses(model, play)
        real = torch.from_numpy(play.mask)
        ratios, moved = play.ratios[real], float(play.moved[real].mean())
        policies.append((bound, int(play.mask.sum()), float(ratios.min()), float(ratios.max()), moved))
        for name, loss, trivial in kinds:
            of_three = (found[loss], found[trivial], found[loss] - found[trivial])
            rows.append((name, bound, *(end for x in of_three for end in interval(x, play.mask, args.seed))))
    page.table("policies", ("C", "transitions", "least ratio", "largest ratio", "moved"), policies)
    page.text(
        "L_P and L_R are the means of ℓ_P = d̄(z', z̄') and of the script's ℓ_R over these transitions: L_P with P̄'s "
        "mean, 'L_P sample' with a sample of it as in training (the same where P̄ has no noise). 'Trivial' is what z' = z "
        "pays, or always predicting the reward 0; 'difference' is loss less trivial: below 0 the model knows more. "
        "Low and high: the 95 % interval over games."
    )
    names = [f"{name}{end}" for name in ("mean", "trivial", "difference") for end in ("", " low", " high")]
    page.table(
        "calibration", ("loss", "C", *names), sorted(rows, key=lambda row: [kind[0] for kind in kinds].index(row[0]))
    )
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for i, (name, _, _) in enumerate(kinds):
        ax, of_kind = axes(figure, 1, len(kinds), i + 1, title=name), [row for row in rows if row[0] == name]
        for j, label, colour in ((2, "model", BLUE), (5, "trivial", ORANGE)):
            value, low, high = (np.array([row[j + end] for row in of_kind]) for end in range(3))
            x = np.arange(len(value)) + (j - 3.5) / 30
            ax.errorbar(x, value, (value - low, high - value), fmt="o", ms=4, color=colour, label=label)
        ax.set_xticks(range(len(of_kind)), [f"C = {row[1]:g}" for row in of_kind])
        ax.set_ylim(0), ax.legend(frameon=False, fontsize=8)
    page.figure(figure, "losses over the bound C")


def reward(page: Page, play: Play, found: dict[str, np.ndarray]) -> None:
    """R̄ by true reward."""
    page.text(
        "Rewards as the learner sees them (on Atari clipped to their sign, on vectors scaled), over the policy's own "
        "transitions: their count, mean true reward, mean and standard deviation of R̄, by true reward; where there are "
        "more than 12 values, by range. A model that knows rewards has its mean prediction near the true mean."
    )
    true, predicted, rows = play.rewards.numpy()[play.mask], found["predicted_reward"][play.mask], []
    for name, members in reward_bins(true):
        if members.any():
            of_true, of_predicted = true[members].astype(np.float64), predicted[members].astype(np.float64)
            rows.append(
                (name, int(members.sum()), *map(float, (of_true.mean(), of_predicted.mean(), of_predicted.std())))
            )
    page.table("rewards", ("reward", "transitions", "mean true", "mean predicted", "std predicted"), rows)


def representation(page: Page, play: Play, seed: int) -> None:
    """|ΔV| over d̄."""
    d, difference, K = value_pairs(play, seed)
    page.text(
        f"{len(d)} random pairs of observations of these games: |V(s1) - V(s2)| over d̄(z1, z2). K is the smallest number "
        "with |V(s1) - V(s2)| <= K d̄(z1, z2) in 95 % of the pairs: the line. Where it is large, latents that are alike "
        "have different values."
    )
    page.table(
        "pairs", ("d̄", "|V(s1) - V(s2)|"), list(zip(d.tolist(), difference.tolist(), strict=True)), is_shown=False
    )
    row = (len(d), K, float(d.mean()), float(difference.mean()))
    page.table("representation", ("pairs", "K", "mean d̄", "mean |V(s1) - V(s2)|"), [row])
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    ax = axes(figure, xlabel="d̄(z1, z2)", ylabel="|V(s1) - V(s2)|")
    ax.plot(d, difference, ".", ms=3, alpha=0.3, color=BLUE)
    if np.isfinite(K):
        ax.plot((0, d.max()), (0, K * d.max()), color=ORANGE, label=f"K = {shown(K)}")
        ax.legend(frameon=False)
    ax.set_xlim(0), ax.set_ylim(0, difference.max() * 1.05 + 1e-9)
    page.figure(figure, "value difference over latent distance")


def neighbourhood(page: Page, run_dir: Path, clip_coef: float) -> None:
    """The logged ratios, with N^C."""
    numbers, bins = logged_ratios(run_dir)
    if not bins:
        page.text(
            "The run has logged no histogram spi/ratios: it has no TensorBoard events, or no checkpoint yet.", "note"
        )
        return
    page.text(
        "Ratios π_new(a|s)/π_old(a|s), as the run logged them at its last checkpoint: over the minibatches of the last "
        f"epoch, each before its own step. N^C, here with C = 1 + ε = {1 + clip_coef:g}, lies between the lines. "
        "TensorBoard's bins are 10 % wide: the share outside N^C is not read off them, but logged beside them."
    )
    page.table("neighbourhood", ("of the run", "value"), [*numbers.items(), ("C", 1 + clip_coef)])
    page.table("ratios", ("from", "to", "count"), bins)
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = axes(figure, xlabel="ratio", ylabel="(s, a), per unit of ratio")
    lows, highs, counts = map(np.array, zip(*bins, strict=True))
    ax.bar(lows, counts / (highs - lows), highs - lows, align="edge", color=BLUE, alpha=0.6, edgecolor="white")
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
    name = config["script"]
    check(hasattr(agent, "transition_model"), "run", own.run, f"the agent of {name} has no world model to inspect")
    model = Model(script, agent, args, state)
    play = record(model, args, own.steps)
    found = losses(model, play)

    page = Page(own.run / "inspection", f"What the world model knows: {args.env_id}, {name}")
    trained = "its final weights"
    if "iterations" in state:
        trained = (
            f"its weights after {state['iterations'] * config['args']['num_envs'] * config['args']['num_steps']} steps"
        )
    page.text(
        f"Run {own.run.resolve().name}, {trained}. {own.games} new games of {own.steps} steps (seed {own.seed}), actions "
        f"sampled from the policy, float32 on the CPU: {play.mask.sum()} transitions. The latent has {play.z[0, 0].numel()} "
        "numbers. d̄ is smooth-L1, mean over them; every loss of a latent is of this unit."
    )
    for line in model.lacks:
        page.text(line, "note")
    page.heading("Film: where is the model wrong?")
    film(page, play, found)
    rows, columns = [], {"value": play.values[:-1].numpy(), "reward": play.rewards.numpy(), **found}
    for t, game in np.argwhere(play.mask):
        rows.append((int(game), int(t), *(float(x[t, game]) for x in columns.values())))
    page.table("rows", ("game", "step", *columns), rows, is_shown=False)
    page.heading("Open loop: what does the model see ahead?")
    open_loop(page, model, play, own.seed)
    page.heading("Calibration: what does the model know where other policies would be?")
    calibration(page, model, args, play, found)
    if model.has_reward:
        page.heading("Reward: R̄ by true reward")
        reward(page, play, found)
    page.heading("Representation: do latents that are alike have like values?")
    representation(page, play, own.seed)
    page.heading("Neighbourhood: how far did the last update go?")
    neighbourhood(page, own.run, args.clip_coef)
    print(f"{page.write()}: open it in a browser")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # in any locale: Greek letters, paths
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}")
