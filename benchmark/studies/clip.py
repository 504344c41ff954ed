"""What the clip stops, and what it does not: python -m benchmark.studies.clip

J's derivatives after r and after ℓ, row by row, for the three places where the losses may stand. They are autograd's,
through `deep_spi_ppo.compute_loss` itself: only the networks are replaced, by what they put out. No runs: a second.
"""

from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import deep_spi_ppo
from benchmark.common import RESULTS, markdown
from benchmark.report.pictures import COLOURS, save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EPSILON, ALPHA = 0.1, 0.01  # Deep SPI's on Atari: ε, and α_R for the loss that is followed
PLACEMENTS = {"utility": "in U", "additive": "beside J", "gated": "in U, gated"}  # where ℓ stands
LOOKS = {  # colour, width and dashes: curves that lie on each other stay visible
    "utility": {"color": COLOURS["deep_spi"], "lw": 5, "alpha": 0.6},
    "additive": {"color": COLOURS["additive"], "lw": 2},
    "gated": {"color": COLOURS["gated"], "lw": 2, "ls": (0, (4, 2))},
}
SHOWN = (0.5, 1.0, 2.0)  # ratios of the table


def derivatives(placement: str, ratios: np.ndarray, weighted_loss: float) -> dict[int, dict[str, np.ndarray]]:
    """∂J/∂r and the pull -∂J/∂ℓ / α at each ratio (R,), for A = +1 and for A = -1; αℓ is `weighted_loss`.

    J is a minibatch's mean; what is given is of one row, times their number. A minibatch with as many +1 as -1 is
    normalised already. R̄ is ½ beyond the loss away from the reward, where smooth-L1 has slope 1: ∂R̄ is ∂ℓ.
    """
    alpha = max(ALPHA, weighted_loss)  # so that ℓ >= 1: on smooth-L1's straight part; the pull is in units of α
    rows = 2 * len(ratios)
    advantages = torch.tensor([1.0, -1.0]).repeat_interleave(len(ratios))
    old_log_probs = torch.full((rows, 2), 0.5).log()
    log_probs = old_log_probs.clone()
    log_probs[:, 1] += torch.tensor(ratios, dtype=torch.float32).log().repeat(2)
    predicted = torch.full((rows,), weighted_loss / alpha + 0.5, requires_grad=True)
    agent = SimpleNamespace(
        encode=lambda obs: obs,
        policy_and_value=lambda z: (log_probs.requires_grad_(), torch.zeros(rows)),
        reward_model=lambda z, actions: predicted,
        transition_model=lambda z, actions, noise: z,
    )
    zeros, ones = torch.zeros(rows), torch.ones(rows)
    obs = torch.zeros(rows, 2, 1)  # s and s' of each row
    batch = deep_spi_ppo.Transitions(obs, ones.long(), zeros, old_log_probs, advantages, zeros, ones)
    settings = {"loss_placement": placement, "clip_coef": EPSILON, "reward_loss_coef": alpha}
    args = deep_spi_ppo.Args(**settings, ent_coef=0.0, vf_coef=0.0)
    loss, _ = deep_spi_ppo.compute_loss(agent, batch, args, zeros)
    loss.backward()  # the loss is -J
    by_ratio = -rows * log_probs.grad[:, 1].double().numpy() / np.tile(ratios, 2)  # ∂J/∂r = ∂J/∂(ln r) / r
    pull = rows * predicted.grad.double().numpy() / alpha
    halves = {1: slice(0, len(ratios)), -1: slice(len(ratios), rows)}
    return {sign: {"ratio": by_ratio[half], "pull": pull[half]} for sign, half in halves.items()}


def table() -> str:
    """Markdown: the derivatives at three ratios, for A = +1 and A = -1, with a loss too small to turn U's sign."""
    columns = [(sign, i) for sign in (1, -1) for i in range(len(SHOWN))]
    found = {placement: derivatives(placement, np.array(SHOWN), ALPHA) for placement in PLACEMENTS}
    clipped = ["yes" if found["utility"][sign]["ratio"][i] == 0 else "no" for sign, i in columns]
    rows = [["the clip is active", *clipped]]
    for placement, where in list(PLACEMENTS.items())[:2]:  # gated: as in U
        slopes = (f"{found[placement][sign]['ratio'][i]:z.2f}" for sign, i in columns)
        rows.append([f"∂J/∂r, ℓ {where}", *slopes])
    for placement, where in PLACEMENTS.items():
        pulls = (f"{found[placement][sign]['pull'][i]:z.2f}" for sign, i in columns)
        rows.append([f"pull of ℓ {where} (`{placement}`)", *pulls])
    return markdown(["row", *(f"A = {'+' if sign > 0 else '−'}1, r = {SHOWN[i]:g}" for sign, i in columns)], rows)


def draw() -> None:
    """A column for A > 0, for A < 0, and for A > 0 with U < 0, as ℓ is large; ∂J/∂r above, the pull of ℓ below."""
    ratios = np.linspace(0.4, 2.2, 1800)  # none at the very edge of the clip
    columns = {
        "A = +1, αℓ = 0.01": (1, ALPHA),
        "A = −1, αℓ = 0.01": (-1, ALPHA),
        "A = +1, αℓ = 1.5: in U, U = −0.5": (1, 1.5),
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.4), sharex=True, sharey="row", layout="constrained")
    for (above, below), (title, (sign, weighted_loss)) in zip(axes.T, columns.items(), strict=True):
        above.set_title(title, fontsize=11)
        for axis in (above, below):
            axis.axvspan(1 - EPSILON, 1 + EPSILON, color="0.9", linewidth=0)
            axis.axhline(0, color="0.4", linewidth=0.8)
        for placement, label in PLACEMENTS.items():
            found = derivatives(placement, ratios, weighted_loss)[sign]
            above.plot(ratios, found["ratio"], **LOOKS[placement])
            below.plot(ratios, found["pull"], **LOOKS[placement], label=f"ℓ {label}")
        below.set_xlabel("r = π_new(a|s) / π_old(a|s)")
    axes[0, 0].set_ylabel("∂J/∂r")
    axes[1, 0].set_ylabel("−∂J/∂ℓ, in units of α")
    axes[1, 0].legend(fontsize=9, loc="upper left")
    save_figure(figure, RESULTS / "clip.png")


if __name__ == "__main__":
    draw()
    print(table())
