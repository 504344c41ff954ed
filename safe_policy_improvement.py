# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""The theory of Deep SPI on MDPs small enough to solve exactly: four experiments, a picture each.

Paper: "Deep SPI: Safe Policy Improvement via World Models", Delgrange, Avalos and Röpke, ICLR 2026.

| symbol         | in code                | meaning                                                                 |
|----------------|------------------------|-------------------------------------------------------------------------|
| M = (P, R)     | `P`, `R`, `start`      | the real MDP; what a row P(.|s,a) lacks to 1 is the end of the episode  |
| φ              | `phi`                  | state → latent index; the latents lie on a line, at `position`          |
| M̄ = (P̄, R̄)     | `model_P`, `model_R`   | the world model, learned from the data of the behaviour policy `pi_b`   |
| N^C(π_b)       | `C`                    | 2−C ≤ π(a|s)/π_b(a|s) ≤ C with the same support, 1 < C < 2              |
| ℓ_R, ℓ_P       | `Case.losses`          | the model's error at each (s,a); L_R, L_P: their means over π_b's steps |
| K_V            | `K_V`                  | Lipschitz constant of the model's value function V̄                      |
| H_b            | `visits.sum()`         | expected length of an episode of π_b                                    |

    python safe_policy_improvement.py                             # all four, about a minute on one core
    python safe_policy_improvement.py --section planning-bound    # one of them

Expect five tables, and four pictures and a CSV in runs/safe_policy_improvement. With exact advantages V never falls
inside N^C; with a learned model it falls far less there than outside. No bound is broken inside N^{1/γ}; outside, some
are. Only the data of the learned models are sampled; everything else is a linear solve in float64.
"""

# ==== 0. Imports and flags ====
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by colour-blind eyes
BLUE, GREEN, ORANGE, PURPLE, RED, SKY = COLOURS = "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9"


@dataclass
class Args:
    section: str = "all"
    """all, neighbourhood, out-of-trajectory, planning-bound or representation"""
    out_dir: str = "runs/safe_policy_improvement"
    """folder for the pictures and the CSV"""
    seed: int = 0
    """seed of the random MDPs and of the data"""
    gamma: float = 0.9
    """discount factor, above 1/2 so that 1/gamma < 2"""
    n_states: int = 40
    """states of a random MDP"""
    n_actions: int = 4
    """actions of a random MDP"""
    termination: float = 0.2
    """mean probability that a step of a random MDP ends the episode"""
    n_mdps: int = 100
    """section 1: random MDPs improved with exact advantages"""
    n_iterations: int = 1000
    """section 1: most iterations with exact advantages"""
    Cs: tuple[float, ...] = (1.05, 1.2, 1.5, 1.9)
    """section 1: sizes of the neighbourhoods compared"""
    C: float = 1.5
    """sections 1 and 2: size of the neighbourhood when the model is learned"""
    n_rollouts: int = 200
    """section 1: episodes of pi_n from which iteration n learns its model"""
    epsilons: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """section 2: probabilities with which pi_b takes a_2 (from 0.06 on, the model gives up S_2 to fit S_3)"""
    n_learned: int = 60
    """sections 1, 3 and 4: random MDPs of which a model is learned"""
    n_episodes: int = 1_000_000
    """sections 3 and 4: episodes of pi_b from which a model is learned"""
    epsilon: float = 1e-7
    """sections 3 and 4: probability with which pi_b takes its rarest action"""
    bound_C: float | None = None
    """sections 3 and 4: size of the neighbourhood, at most 1/gamma (default: 1/gamma)"""
    n_latents: tuple[int, ...] = (40, 20, 10, 5)
    """section 3: numbers of latents, fine to coarse"""
    pair_latents: int = 20
    """section 4: number of latents"""


# ==== Episodic MDPs, solved exactly ====
class MDP(NamedTuple):
    """An episode ends after (s, a) with probability 1 - P[s, a].sum(). P and R may have leading batch dimensions."""

    P: np.ndarray  # (..., S, A, S)
    R: np.ndarray  # (..., S, A)
    start: np.ndarray  # (S,)


def garnet(rng: np.random.Generator, n_states: int, n_actions: int, termination: float, batch: tuple = ()) -> MDP:
    """Each (s,a) leads to 3 random states with random weights, pays U(0,1) and may end the episode."""
    shape = (*batch, n_states, n_actions)
    successors = np.argsort(rng.random((*shape, n_states)), axis=-1)[..., :3]
    P = np.zeros((*shape, n_states))
    np.put_along_axis(P, successors, rng.dirichlet(np.ones(successors.shape[-1]), size=shape), axis=-1)
    P *= 1 - termination * rng.uniform(0.5, 1.5, size=(*shape, 1))
    return MDP(P, rng.random(shape), np.full(n_states, 1 / n_states))


def gridworld(size: int = 5) -> MDP:
    """From the top left to the goal (+1) at the bottom right, a pit (-1) in the centre; one move in ten slips."""
    n_states = size * size
    goal, pit = n_states - 1, n_states // 2
    moves = np.zeros((n_states, 4, n_states))
    R = np.full((n_states, 4), -0.02)
    for s in range(n_states):
        for a, (row_step, column_step) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
            row, column = np.clip([s // size + row_step, s % size + column_step], 0, size - 1)
            moves[s, a, row * size + column] = 1.0
    P = 0.9 * moves + 0.1 * moves.mean(1, keepdims=True)
    P[[goal, pit]] = 0.0
    R[goal], R[pit] = 1.0, -1.0
    return MDP(P, R, np.eye(n_states)[0])


def value(P: np.ndarray, R: np.ndarray, pi: np.ndarray, gamma: float) -> np.ndarray:
    """V^π = (I - γ P_π)^-1 R_π, shape (..., S), by one linear solve."""
    P_pi = np.einsum("...sa,...sat->...st", pi, P)
    return np.linalg.solve(np.eye(P.shape[-1]) - gamma * P_pi, (pi * R).sum(-1)[..., None])[..., 0]


def action_value(P: np.ndarray, R: np.ndarray, V: np.ndarray, gamma: float) -> np.ndarray:
    """Q(s,a) = R(s,a) + γ Σ_s' P(s'|s,a) V(s'), shape (..., S, A)."""
    return R + gamma * np.einsum("...sat,...t->...sa", P, V)


def greedy(Q: np.ndarray) -> np.ndarray:
    """The deterministic policy of the best actions, shape of Q."""
    return np.eye(Q.shape[-1])[Q.argmax(-1)]


def plan(P: np.ndarray, R: np.ndarray, gamma: float, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The best policy (..., S, A) that `choose` allows, by policy iteration until no state gains.

    `choose` maps Q to the policy that maximises Σ_a π(a|s) Q(s,a) in every state: `greedy`, or `improve` around π_b.
    """
    pi = choose(R)
    V = value(P, R, pi, gamma)
    while True:
        pi = choose(action_value(P, R, V, gamma))
        new_V = value(P, R, pi, gamma)
        if (new_V - V).max() < 1e-12:
            return pi
        V = new_V


def expected_visits(mdp: MDP, pi: np.ndarray) -> np.ndarray:
    """How often an episode of π visits each (s,a) in expectation, shape (S, A); the sum is its expected length."""
    P_pi = np.einsum("sa,sat->st", pi, mdp.P)
    return np.linalg.solve(np.eye(len(P_pi)) - P_pi.T, mdp.start)[:, None] * pi


def rollout(mdp: MDP, pi: np.ndarray, n_episodes: int, rng: np.random.Generator) -> np.ndarray:
    """How often each transition occurs in `n_episodes` episodes of π: (S, A, S+1), the last column for the end.

    Only the counts are needed, so all episodes move together: of the n in state s, a multinomial draw says how many
    take each action, another where those arrive. That has the distribution of n separate episodes.
    """
    end = np.maximum(0, 1 - mdp.P.sum(-1, keepdims=True))
    outcomes = np.concatenate([mdp.P, end], axis=-1)
    counts = np.zeros(outcomes.shape)
    in_state = rng.multinomial(n_episodes, mdp.start)
    while in_state.any():
        arrivals = rng.multinomial(rng.multinomial(in_state, pi), outcomes)
        counts += arrivals
        in_state = arrivals.sum((0, 1))[:-1]
    return counts


def learn_model(counts: np.ndarray, R: np.ndarray, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World model P̄ (Z, A, Z) and R̄ (Z, A): averages of the data, seen through φ (S,).

    What the data lack is predicted by the same action's average over all latents (or, for an action never taken, by
    the average over everything): the model generalises, as a network would, and is wrong where a latent is special.
    """
    one_hot = np.eye(phi.max() + 1)[phi]
    visits = np.einsum("sz,sa->za", one_hot, counts.sum(-1))
    reward_sums = np.einsum("sz,sa->za", one_hot, counts.sum(-1) * R)
    next_counts = np.einsum("sz,sat,tk->zak", one_hot, counts[:, :, :-1], one_hot)
    sums = np.concatenate([next_counts, reward_sums[..., None]], axis=-1)  # (Z, A, Z+1)
    prediction = sums.sum((0, 1)) / visits.sum()
    for n, total in ((visits.sum(0), sums.sum(0)), (visits, sums)):  # from the general to the particular
        prediction = np.where(n[..., None] > 0, total / np.maximum(n, 1)[..., None], prediction)
    return prediction[..., :-1], prediction[..., -1]


# ==== 1. The neighbourhood ====
def improve(pi: np.ndarray, advantage: np.ndarray, C: float) -> np.ndarray:
    """argsup over π' in N^C(π) of Σ_a π'(a|s) A(s,a), the linear programme of each state, in closed form.

    Talk: "Your Friendly Neighborhood Policy". Start each action at its floor, (2-C) π(a|s). That leaves probability
    C-1 to hand out, and an action has room for 2(C-1) π(a|s) below its ceiling C π(a|s). Fill the best action, then
    the next, until nothing is left: the better half of π's probability ends at the ceiling, the worse half at the
    floor, one action in between. Floors are positive, so the support stays. The talk's mean over μ_π says nothing of
    states that π never visits; they are improved too.

    pi, advantage and the result are (..., A); Q does as well as A, since V(s) is the same for all actions.
    """
    order = np.argsort(-advantage, axis=-1)
    room = np.take_along_axis(2 * (C - 1) * pi, order, axis=-1)
    handed_out_before = room.cumsum(-1) - room
    share = np.clip((C - 1) - handed_out_before, 0, room)
    return (2 - C) * pi + np.take_along_axis(share, order.argsort(-1), axis=-1)


def policy_improvement(mdp: MDP, C: float, gamma: float, n_iterations: int) -> Iterator[np.ndarray]:
    """Yield V^{π_n} (..., S) for n = 0 to n_iterations: exact advantages, from the uniform policy."""
    pi = np.full(mdp.R.shape, 1 / mdp.R.shape[-1])
    for _ in range(n_iterations + 1):
        V = value(mdp.P, mdp.R, pi, gamma)
        yield V
        pi = improve(pi, action_value(mdp.P, mdp.R, V, gamma), C)


def improve_with_learned_models(
    mdp: MDP, gamma: float, n_iterations: int, n_rollouts: int, rng: np.random.Generator, step: Callable
) -> np.ndarray:
    """The real V^{π_n} (n_iterations + 1, S) when π_{n+1} = step(π_n, Q), Q from a model of π_n's own episodes."""
    pi = np.full(mdp.R.shape, 1 / mdp.R.shape[-1])
    values = [value(mdp.P, mdp.R, pi, gamma)]
    for _ in range(n_iterations):
        model = learn_model(rollout(mdp, pi, n_rollouts, rng), mdp.R, np.arange(len(mdp.R)))
        pi = step(pi, action_value(*model, value(*model, pi, gamma), gamma))
        values.append(value(mdp.P, mdp.R, pi, gamma))
    return np.stack(values)


def neighbourhood(args: Args, out_dir: Path) -> list[tuple]:
    """Section 1: exact advantages for several C on a gridworld and on Garnets; then advantages from learned models."""
    rng = np.random.default_rng([args.seed, 1])
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8))
    rows, table = [], []
    garnets = garnet(rng, args.n_states, args.n_actions, args.termination, batch=(args.n_mdps,))
    for name, mdp in (("gridworld", gridworld()), ("Garnets", garnets)):
        best = value(mdp.P, mdp.R, plan(mdp.P, mdp.R, args.gamma, greedy), args.gamma)
        for i, C in enumerate(args.Cs):
            returns, distances, fall, V = [], [], 0.0, -np.inf
            for new_V in policy_improvement(mdp, C, args.gamma, args.n_iterations):
                fall, V = max(fall, (V - new_V).max()), new_V
                returns.append((V @ mdp.start).mean())
                distances.append((best - V).max())
                if distances[-1] < 1e-10:
                    break
            n = np.arange(len(returns))
            numbers = {"iterations": n[-1], "largest fall of V(s)": fall, "V*(s) - V(s) at the end": distances[-1]}
            table.append({"MDPs": name, "C": C} | numbers)
            rows += [(1, f"{name}, C={C}", "V(start)", *xy) for xy in enumerate(returns)]
            rows += [(1, f"{name}, C={C}", "largest V*(s) - V(s)", *xy) for xy in enumerate(distances)]
            look = {"color": COLOURS[i % 4], "ls": ("-", "--", "-.", ":")[i % 4], "lw": 2.5, "label": f"C = {C:g}"}
            if name == "gridworld":
                axes[0].plot(n[1:], returns[1:], **look)
            else:
                axes[1].plot(n[1:], distances[1:], **look)
        if name == "gridworld":
            axes[0].axhline(best @ mdp.start, color="black", ls="--", lw=1, label="$V^*$")
    show("1. The neighbourhood, exact advantages; the worst of all states", table)

    table = []
    steps = {"unconstrained": lambda pi, Q: greedy(Q), "inside N^C": lambda pi, Q: improve(pi, Q, args.C)}
    mdps = [garnet(rng, args.n_states, args.n_actions, args.termination) for _ in range(args.n_learned)]
    best = [value(mdp.P, mdp.R, plan(mdp.P, mdp.R, args.gamma, greedy), args.gamma).mean() for mdp in mdps]
    for (name, step), colour in zip(steps.items(), (RED, BLUE), strict=True):
        values = [improve_with_learned_models(mdp, args.gamma, 20, args.n_rollouts, rng, step) for mdp in mdps]
        falls = np.maximum(0, -np.diff(values, axis=1).min(-1))  # (MDPs, iterations), the worst state of each
        ratios = np.mean(values, axis=-1) / np.array(best)[:, None]  # (MDPs, iterations + 1)
        numbers = {"share of steps with a fall": (falls > 1e-9).mean(), "largest fall of V(s)": falls.max()}
        table.append({"step": name} | numbers | {"V / V* at the end": ratios[:, -1].mean()})
        rows += [(1, name, "V / V*, mean over MDPs", *xy) for xy in enumerate(ratios.mean(0))]
        rows += [(1, name, "fall of V(s), mean over MDPs", *xy) for xy in enumerate(falls.mean(0), start=1)]
        axes[2].plot(ratios[:3].T, color=colour, lw=2)
        axes[2].plot([], color=colour, lw=2, label=name.replace("N^C", f"$N^C$, C = {args.C:g}"))
    show(f"   Advantages from learned models, C = {args.C:g}", table)

    axes[0].set(xscale="log", xlabel="iteration n", ylabel=r"$V^{\pi_n}$(start)", title="Exact advantages: gridworld")
    axes[1].set(xscale="log", yscale="log", xlabel="iteration n", ylabel=r"$\max_s\ V^*(s) - V^{\pi_n}(s)$")
    axes[1].set_title(f"Exact advantages: the worst of {args.n_mdps} Garnets")
    axes[2].axhline(1, color="black", ls="--", lw=1, label="$V^*$")
    axes[2].set(xlabel="iteration n", ylabel=r"mean of $V^{\pi_n}$ / mean of $V^*$", xticks=range(0, 21, 5))
    axes[2].set_ylim(bottom=0.2)
    axes[2].set_title(f"Advantages from learned models: {min(3, len(mdps))} Garnets")
    for axis, place in zip(axes, ("lower right", "lower left", "lower right"), strict=True):
        axis.legend(loc=place)
    save(figure, out_dir / "1_neighbourhood.png")
    return rows


# ==== 2. Out-of-trajectory ====
HEIGHT = np.array([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 20.0])  # S_1 is states 0 to 2, S_2 states 3 to 5, S_3 state 6


def mountain() -> MDP:
    """The talk's MDP (slide "The out-of-trajectory (OOT) problem"), on a mountain so that a model can generalise.

    S_1, three camps at height 0: a_1 walks on, at last to S_2; a_2 takes the rope up to S_3. S_2, ledges at 1, 2 and 3:
    a step pays the height; a_1 climbs (at 3 it stays), a_2 goes home. S_3, at 20: the rock breaks, -10, the end.
    """
    P = np.zeros((7, 2, 7))
    P[range(6), 0, [1, 2, 3, 4, 5, 5]] = 1.0
    P[:3, 1, 6] = 1.0
    R = np.repeat(HEIGHT[:, None], 2, axis=1)
    R[6] = -10.0
    return MDP(P, R, np.eye(7)[0])


def weighted_median(numbers: np.ndarray, weights: np.ndarray) -> float:
    """The m that minimises Σ_i weights_i |numbers_i - m|."""
    order = np.argsort(numbers)
    return numbers[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)]


def learn_mountain(mdp: MDP, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The world model of least L_R and L_P on π_b's steps, in a class that has to generalise; exact, infinite data.

    R̄(s,a) = w height(s): E|R - w height| is least at a weighted median of R / height. P̄ knows where the actions lead,
    but has one number q_a to say whether the episode goes on after a above the ground (in S_3: by staying there);
    E|q_a - P(goes on)|, W with the end at distance 1, is least at a weighted median too. visits: (S, A), of π_b.
    """
    above = HEIGHT > 0
    weights = visits * HEIGHT[:, None]
    w = weighted_median((mdp.R[above] / HEIGHT[above, None]).ravel(), weights[above].ravel())
    q = np.array([weighted_median(mdp.P[above, a].sum(-1), visits[above, a]) for a in range(2)])
    model_P = mdp.P.copy()
    model_P[[3, 4, 5, 6], :, [4, 5, 5, 6]] = q
    return model_P, np.repeat(w * HEIGHT[:, None], 2, axis=1)


def out_of_trajectory(args: Args, out_dir: Path) -> list[tuple]:
    """Section 2: plan in the model of π_b's data, without and with the neighbourhood, for each ε = π_b(a_2|s)."""
    mdp, table, visits_to = mountain(), [], []
    for epsilon in args.epsilons:
        pi_b = np.array([[1 - epsilon, epsilon]] * 3 + [[0.5, 0.5]] * 4)
        visits = expected_visits(mdp, pi_b)
        model = learn_mountain(mdp, visits)
        free = plan(*model, args.gamma, greedy)
        near = plan(*model, args.gamma, lambda Q, pi_b=pi_b: improve(pi_b, Q, args.C))
        numbers = {
            "epsilon": epsilon,
            "L_R": (visits * np.abs(mdp.R - model[1])).sum() / visits.sum(),
            "L_P": (visits * np.abs(mdp.P.sum(-1) - model[0].sum(-1))).sum() / visits.sum(),
            "Rbar(S_3)": model[1][6, 0],
            "V(pi_b)": value(mdp.P, mdp.R, pi_b, args.gamma)[0],
            "V(unconstrained)": value(mdp.P, mdp.R, free, args.gamma)[0],
            "promised": value(*model, free, args.gamma)[0],
            "V(inside N^C)": value(mdp.P, mdp.R, near, args.gamma)[0],
            "promised inside": value(*model, near, args.gamma)[0],
        }
        table.append(numbers)
        visits_to.append(visits.sum(1))
    show(f"2. Out-of-trajectory: the real V(start) of plans made in the learned model, C = {args.C:g}", table)

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1.3, 1, 1))
    shown = len(table) // 2
    draw_mountain(axes[0], 1000 * visits_to[shown], f"model says {table[shown]['Rbar(S_3)']:+.0f}")
    axes[0].set_title(f"Visits in 1000 episodes of $\\pi_b$, ε = {args.epsilons[shown]:g}")
    error = [abs(numbers["Rbar(S_3)"] - mdp.R[6, 0]) for numbers in table]
    axes[1].plot(args.epsilons, error, color=RED, marker="^", lw=2.5, label=r"$|R - \bar{R}|$ in $S_3$")
    for axis, name, label, colour, marker in (
        (axes[1], "L_R", "$L_R$, the mean reward error", BLUE, "o"),
        (axes[1], "L_P", "$L_P$, the mean transition error", GREEN, "s"),
        (axes[2], "V(inside N^C)", f"plan inside $N^C$, C = {args.C:g}", BLUE, "o"),
        (axes[2], "V(pi_b)", r"behaviour policy $\pi_b$", "black", "s"),
        (axes[2], "V(unconstrained)", "unconstrained plan", RED, "^"),
    ):
        y = [numbers[name] for numbers in table]
        axis.plot(args.epsilons, y, color=colour, marker=marker, lw=2.5, label=label)
        axis.set(xscale="log", xlabel=r"ε = $\pi_b(a_2|s)$ in $S_1$")
    axes[1].set(yscale="log", ylim=(None, 1e4), title="The mean errors hide the error in $S_3$")
    axes[1].legend(loc="upper left")
    axes[2].set(ylabel="V(start) in the real MDP", title="What plans made in the model are worth")
    axes[2].legend(loc="center")
    save(figure, out_dir / "2_out_of_trajectory.png")
    return [(2, "mountain", name, row["epsilon"], number) for row in table for name, number in row.items()]


def draw_mountain(axis: plt.Axes, visits: np.ndarray, hallucination: str) -> None:
    where = [(0, 0), (1.7, 0), (3.4, 0), (5.1, 0.3), (6.5, 1.1), (7.9, 1.9), (1.7, 2.6)]
    for s, target in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 6), (1, 6), (2, 6)]:
        look = {"color": RED, "ls": "--"} if target == 6 else {"color": BLUE}
        arrow = {"arrowstyle": "-|>", "lw": 1.8, "shrinkA": 24, "shrinkB": 24} | look
        axis.annotate("", where[target], where[s], arrowprops=arrow)
    for (x, y), colour, n in zip(where, [SKY] * 3 + [GREEN] * 3 + [ORANGE], visits, strict=True):
        axis.scatter(x, y, s=1900, color=colour, edgecolor="black", zorder=3)
        axis.text(x, y, f"{n:.0f}" if n >= 10 else f"{n:.2g}", ha="center", va="center", fontsize=12, zorder=4)
    labels = [(1.7, -1, "$S_1$ pays 0"), (7.3, 0.3, "$S_2$ pays 1, 2, 3"), (0.35, 1.6, "$a_2$"), (0.85, 0.25, "$a_1$")]
    for x, y, text in [*labels, (4, 2.6, f"$S_3$ pays −10,\n{hallucination}")]:
        axis.text(x, y, text, ha="center", va="center", fontsize=13)
    axis.set(xlim=(-1, 8.8), ylim=(-1.4, 3.5))
    axis.axis("off")


# ==== 3. The planning bound ====
def smooth_mdp(rng: np.random.Generator, n_states: int, n_actions: int, termination: float) -> MDP:
    """Rewards in [0, 1], moves and endings that vary smoothly along the line, so that neighbours can be merged."""
    x = state_positions(n_states)[:, None]

    def waves() -> np.ndarray:
        return np.sin(rng.uniform(1, 5, n_actions) * x + rng.uniform(0, 2 * np.pi, n_actions))

    aim = 1.5 + 0.5 * waves()
    P = np.exp(-0.5 * ((x[:, 0] - aim[..., None]) / 0.1) ** 2)
    P *= (1 - termination * (1 + 0.5 * waves()))[..., None] / P.sum(-1, keepdims=True)
    return MDP(P, 0.5 + 0.5 * waves(), np.full(n_states, 1 / n_states))


def state_positions(n_states: int) -> np.ndarray:
    """Evenly spaced in (1, 2), shape (S,). The end of the episode lies at 0."""
    return 1 + (np.arange(n_states) + 0.5) / n_states


def wasserstein(p: np.ndarray, q: np.ndarray, position: np.ndarray) -> np.ndarray:
    """W1 of p and q (..., Z) on the line; what they lack to 1 is the end of the episode, at 0.

    The cheapest transport carries across each gap the difference of the probabilities beyond it.
    """
    beyond = np.cumsum((p - q)[..., ::-1], axis=-1)[..., ::-1]
    return (np.abs(beyond) * np.diff(position, prepend=0.0)).sum(-1)


def lipschitz_constant(V: np.ndarray, position: np.ndarray) -> float:
    """K_V of V (Z,), the end (value 0, position 0) included: on a line the steepest slope joins two neighbours."""
    return np.abs(np.diff(V, prepend=0.0) / np.diff(position, prepend=0.0)).max()


class Case(NamedTuple):
    """A real MDP, a behaviour policy, and a world model whose latents lie at ascending positions > 0."""

    mdp: MDP
    pi_b: np.ndarray  # (Z, A)
    model_P: np.ndarray  # (Z, A, Z)
    model_R: np.ndarray  # (Z, A)
    phi: np.ndarray  # (S,)
    position: np.ndarray  # (Z,)

    def values(self, pi: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """V^{π∘φ} (S,) in the real MDP and V̄^π (Z,) in the model, for π (Z, A)."""
        real = value(self.mdp.P, self.mdp.R, pi[self.phi], gamma)
        return real, value(self.model_P, self.model_R, pi, gamma)

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """ℓ_R = |R - R̄| and ℓ_P = W(φ_# P(.|s,a), P̄(.|φ(s),a)), both (S, A) (talk: "Learning a sound world model")."""
        pushed = self.mdp.P @ np.eye(len(self.position))[self.phi]
        transition_loss = wasserstein(pushed, self.model_P[self.phi], self.position)
        return np.abs(self.mdp.R - self.model_R[self.phi]), transition_loss

    def mean_loss(self, K_V: float, gamma: float) -> float:
        """L_R + γ K_V L_P: the mean over all steps of all episodes of π_b, exactly."""
        visits = expected_visits(self.mdp, self.pi_b[self.phi])
        reward_loss, transition_loss = self.losses()
        return (visits * (reward_loss + gamma * K_V * transition_loss)).sum() / visits.sum()


def value_gap_bound(case: Case, C: float, gamma: float, V_model: np.ndarray) -> float:
    """Bound on |V^{π∘φ}(M) - V^π(M̄)| at the start, for π in N^C(π_b) and C <= 1/γ: C H_b (L_R + γ K_V L_P).

    V_model (Z,) is V̄^π, K_V its Lipschitz constant; write f(s,a) = ℓ_R(s,a) + γ K_V ℓ_P(s,a).
    1. Simulation lemma, along the real episode: V^π(s_0) - V̄(φ(s_0)) = E_π Σ_t γ^t [ R - R̄ + γ (E_P V̄(φ(s')) -
       E_P̄ V̄(z')) ], and no bracket exceeds f(s_t,a_t) (Kantorovich). The end of the episode counts as a latent, of
       value 0: both K_V and W must include it.
    2. Change of measure: t+1 actions lead to (s_t,a_t), each at most C times as likely as under π_b, hence
       E_π f(s_t,a_t) <= C^(t+1) E_πb f(s_t,a_t).
    3. As γC <= 1: Σ_t γ^t C^(t+1) E_πb f(s_t,a_t) <= C Σ_t E_πb f(s_t,a_t) = C H_b (L_R + γ K_V L_P).
    At C = 1/γ this is H_b (L_R/γ + K_V L_P), the talk's terms. `chain` makes 3 an equality: no constant is smaller.

    Raises ValueError if γC > 1.
    """
    if gamma * C > 1 + 1e-12:
        raise ValueError(f"the bound needs gamma * C <= 1, got gamma = {gamma}, C = {C}")
    episode_length = expected_visits(case.mdp, case.pi_b[case.phi]).sum()
    return C * episode_length * case.mean_loss(lipschitz_constant(V_model, case.position), gamma)


def zeta(case: Case, C: float, gamma: float, V_model: np.ndarray, V_model_b: np.ndarray) -> float:
    """ζ of "Deep, Safe Policy Improvement": real improvement >= model improvement - ζ for π in N^C(π_b), C <= 1/γ.

    An improvement is a difference of two values: π's gap at ratio C, plus π_b's own gap at ratio 1 with its own K_V.
    """
    return value_gap_bound(case, C, gamma, V_model) + value_gap_bound(case, 1.0, gamma, V_model_b)


def published_zeta(case: Case, SIR: float, gamma: float, V_model: np.ndarray, V_model_b: np.ndarray) -> float:
    """The paper's ζ (Theorem 3): AEL (L_R/γ + K_V L_P) (1/(1/SIR - γ) + 1/(1 - γ)); infinite from SIR = 1/γ on.

    Second-hand, from public notes on arXiv:2510.12312. SIR is the largest ratio π/π_b, AEL = H_b. K_V bounds both
    policies' model values; here it is the smallest that does, so that the paper's ζ is not made larger than it is. What
    else the theorem asks for (K_P̄ < 1/γ, aligned reset states) is not checked. The first fraction is Theorem 2's.
    """
    if gamma * SIR > 1 - 1e-12:
        return np.inf
    K_V = max(lipschitz_constant(V, case.position) for V in (V_model, V_model_b))
    episode_length = expected_visits(case.mdp, case.pi_b[case.phi]).sum()
    loss = case.mean_loss(K_V, gamma) / gamma  # L_R/γ + K_V L_P
    return episode_length * loss * (1 / (1 / SIR - gamma) + 1 / (1 - gamma))


def chain(n_steps: int) -> Case:
    """The worst case: a_1 goes on, a_2 ends, π_b is uniform; only R̄ of the last a_1 is wrong, 1 instead of 0."""
    P, R = np.zeros((n_steps, 2, n_steps)), np.zeros((n_steps, 2))
    P[range(n_steps - 1), 0, range(1, n_steps)] = 1.0
    model_R = R.copy()
    model_R[-1, 0] = 1.0
    states = np.arange(n_steps)
    return Case(MDP(P, R, np.eye(n_steps)[0]), np.full((n_steps, 2), 0.5), P, model_R, states, 1.0 + states)


def chain_ratio(n_steps: int, C: float, gamma: float) -> float:
    """The value gap of the policy at ratio C on a chain, over the bound for N^{1/γ}: (γC)^n, 1 exactly at C = 1/γ."""
    case = chain(n_steps)
    V, V_model = case.values(np.tile([C / 2, 1 - C / 2], (n_steps, 1)), gamma)
    return abs(V[0] - V_model[0]) / value_gap_bound(case, 1 / gamma, gamma, V_model)


def random_case(args: Args, rng: np.random.Generator) -> Callable[[int], Case]:
    """A smooth MDP and the data of a π_b that hardly ever takes its last action; then a case for any number of latents.

    π_b is the same in all states, so it is a policy on the latents of every φ; φ merges neighbouring states.
    """
    mdp = smooth_mdp(rng, args.n_states, args.n_actions, args.termination)
    common = rng.dirichlet(np.ones(args.n_actions - 1)) / 2 + 0.5 / (args.n_actions - 1)
    actions = np.append((1 - args.epsilon) * common, args.epsilon)
    counts = rollout(mdp, np.tile(actions, (args.n_states, 1)), args.n_episodes, rng)

    def with_latents(n_latents: int) -> Case:
        phi = np.arange(args.n_states) * n_latents // args.n_states
        position = np.bincount(phi, state_positions(args.n_states)) / np.bincount(phi)
        return Case(mdp, np.tile(actions, (n_latents, 1)), *learn_model(counts, mdp.R, phi), phi, position)

    return with_latents


def trials(args: Args, rng: np.random.Generator, levels: tuple[int, ...]) -> Iterator[tuple]:
    """Yield (case, side of N^C(π_b), name, policy): the model's best, one that seeks its errors, a random one."""
    C = args.bound_C or 1 / args.gamma
    for _ in range(args.n_learned):
        with_latents = random_case(args, rng)
        for case in map(with_latents, levels):
            yield case, "behaviour", "planner", case.pi_b
            errors = np.eye(len(case.position))[case.phi].T @ sum(case.losses())
            noise = rng.normal(size=errors.shape)
            for side, choose in (("inside", lambda Q, pi_b=case.pi_b: improve(pi_b, Q, C)), ("outside", greedy)):
                yield case, side, "planner", plan(case.model_P, case.model_R, args.gamma, choose)
                yield case, side, "error seeker", choose(errors)
                yield case, side, "random", choose(noise)


def two_zetas(case: Case, C: float, gamma: float) -> dict[str, float]:
    """Of the model's best policy in N^C(π_b): |real - model| improvement, our ζ, the paper's at its largest ratio."""
    pi = plan(case.model_P, case.model_R, gamma, lambda Q: improve(case.pi_b, Q, C))
    (V, V_model), (V_b, V_model_b) = case.values(pi, gamma), case.values(case.pi_b, gamma)
    return {
        "|real - model|": abs(case.mdp.start @ (V - V_b - (V_model - V_model_b)[case.phi])),
        "zeta": zeta(case, C, gamma, V_model, V_model_b),
        "the paper's zeta": published_zeta(case, (pi / case.pi_b).max(), gamma, V_model, V_model_b),
    }


def planning_bound(args: Args, out_dir: Path) -> list[tuple]:
    """Section 3: real improvement against model improvement minus ζ, inside and outside the neighbourhood."""
    rng = np.random.default_rng([args.seed, 3])
    C = args.bound_C or 1 / args.gamma
    rows, results, table = [], [], []
    n_compared = args.n_latents[len(args.n_latents) // 2]
    widths = 1 + (1 / args.gamma - 1) * np.array([0.01, *np.arange(0.1, 1, 0.1), 0.99, 0.999, 1])  # up to C = 1/γ
    compared = {width: [] for width in widths}
    for case, side, policy, pi in trials(args, rng, args.n_latents):
        if side == "behaviour":
            V_b, V_model_b = case.values(pi, args.gamma)
            for width in widths if len(case.position) == n_compared else ():
                compared[width].append(two_zetas(case, width, args.gamma))
            continue
        V, V_model = case.values(pi, args.gamma)
        real = case.mdp.start @ (V - V_b)
        imagined = case.mdp.start @ (V_model - V_model_b)[case.phi]
        slack = zeta(case, C, args.gamma, V_model, V_model_b)
        results.append((side == "inside", len(case.position), real, imagined, slack))
        numbers = {"real improvement": real, "model improvement": imagined, "zeta": slack}
        rows += [(3, f"{side}, {policy}", name, len(case.position), number) for name, number in numbers.items()]

    figure, axes = plt.subplots(2, 2, figsize=(13, 9.4))
    axes = axes.ravel()
    inside, latents, *_ = results = np.array(results).T
    for side, colour, marker in (("outside", ORANGE, "s"), ("inside", BLUE, "o")):
        chosen = inside == (side == "inside")
        means = []
        for n_latents in args.n_latents:
            real, imagined, slack = results[2:, chosen & (latents == n_latents)]
            gap, violations = np.abs(real - imagined), (real < imagined - slack).sum()
            numbers = {"improvement": real.mean(), "in the model": imagined.mean(), "zeta": slack.mean()}
            counts = {"largest |gap|/zeta": (gap / slack).max(), "violations": f"{violations} of {len(gap)}"}
            table.append({"policies": side, "latents": n_latents} | numbers | counts)
            means.append((slack.mean(), gap.mean()))
        real, imagined, slack = results[2:, chosen]
        guaranteed, bad = imagined - slack, real < imagined - slack
        axes[0].scatter(guaranteed, real, s=14, color=colour, marker=marker, alpha=0.6, lw=0)
        axes[0].scatter(guaranteed[bad], real[bad], s=45, facecolor="none", edgecolor="black", lw=0.8)
        label = f"{side}: {bad.sum()} of {len(bad)} violate it"
        axes[0].scatter([], [], s=40, color=colour, marker=marker, label=label)
        for y, style, label in zip(np.transpose(means), ("--", "-"), ("ζ", "|real − model|"), strict=True):
            look = {"color": colour, "marker": marker, "ls": style, "lw": 2.5}
            axes[1].plot(args.n_latents, y, **look, label=f"{label}, {side}")
    show(f"3. The planning bound, {args.n_learned} smooth MDPs, C = {C:.4g}, 1/gamma = {1 / args.gamma:.4g}", table)

    limits = np.array(axes[0].get_ylim())
    axes[0].plot(limits, limits, color="black", ls="--", lw=1)
    axes[0].set(xlabel="guaranteed: improvement in the model − ζ", ylabel="real improvement", ylim=limits * (1, 1.4))
    axes[0].set_title("The guarantee holds above the dashed line")
    axes[0].legend(loc="upper left")
    axes[1].set(xscale="log", yscale="log", xlabel="number of latents: fine to coarse")
    axes[1].set_title("The price of merging states")
    axes[1].set_xticks(args.n_latents, args.n_latents)
    axes[1].minorticks_off()
    axes[1].invert_xaxis()
    axes[1].legend(handlelength=3.5)
    Cs = np.linspace(1, min(2, 1.35 / args.gamma), 51)
    for n_steps, colour, style in ((1, SKY, "-"), (5, BLUE, "--"), (20, PURPLE, "-.")):
        ratios = [chain_ratio(n_steps, C, args.gamma) for C in Cs]
        axes[2].plot(Cs, ratios, color=colour, ls=style, lw=2.5, label=f"chain of {n_steps}")
    axes[2].axhline(1, color="black", ls="--", lw=1)
    axes[2].axvline(1 / args.gamma, color="black", ls=":", lw=2, label="C = 1/γ")
    axes[2].set(yscale="log", xlabel="C, the largest ratio of the policy", ylabel="|real − model| / bound at 1/γ")
    axes[2].set_title("A worst case: the bound is tight at 1/γ")
    axes[2].legend(loc="lower right")

    means = [{name: np.mean([one[name] for one in ones]) for name in ones[0]} for ones in compared.values()]
    show(f"   Two sets of constants, {n_compared} latents", [{"C": C} | m for C, m in zip(widths, means, strict=True)])
    for name, colour, marker, style, label in (
        ("the paper's zeta", RED, "^", "--", "ζ, the paper's"),
        ("zeta", BLUE, "o", "--", "ζ, this project's"),
        ("|real - model|", BLUE, "o", "-", "|real − model|"),
    ):
        finite = [(C, mean[name]) for C, mean in zip(widths, means, strict=True) if np.isfinite(mean[name])]
        axes[3].plot(*np.transpose(finite), color=colour, marker=marker, ls=style, lw=2.5, label=label)
        rows += [(3, f"planner, {n_compared} latents", name, *xy) for xy in finite]
    axes[3].axvline(1 / args.gamma, color="black", ls=":", lw=2)
    axes[3].set(yscale="log", xlabel="C of the neighbourhood that is planned in")
    axes[3].set_title(f"Two sets of constants, {n_compared} latents; C = 1/γ dotted")
    axes[3].legend(loc="center left", bbox_to_anchor=(0, 0.45), handlelength=3.5)
    save(figure, out_dir / "3_planning_bound.png")
    return rows


# ==== 4. The representation ====
def pair_bound(case: Case, C: float, gamma: float, V_model: np.ndarray) -> float:
    """δ ε of "Deep, Safe Policy Improvement for representation learning": 2 C T (L_R + γ K_V L_P), C <= 1/γ.

        P( |V^π(s_1) - V^π(s_2)| > K_V d̄(φ(s_1), φ(s_2)) + ε ) <= δ   for π in N^C(π_b)

    s_1 and s_2 are drawn from ξ(s), the share of π_b's steps spent in s; they need not be independent.
    1. |V(s_1) - V(s_2)| <= g(s_1) + |V̄(φ(s_1)) - V̄(φ(s_2))| + g(s_2) with g(s) = |V^π(s) - V̄(φ(s))|; the middle is at
       most K_V d̄. A pair above by more than ε has g(s_1) + g(s_2) > ε: by Markov's inequality, P <= 2 E_ξ[g] / ε.
    2. As in `value_gap_bound`, but from s_0 ~ ξ: E_ξ[g] <= C Σ_t (γC)^t E_πb f(s_t,a_t). The states of that sum have
       the weights ξ (I - γC P_b)^-1 <= T ξ, with T the largest quotient over the states: E_ξ[g] <= C T E_ξ[f].
    T <= 1/(1 - γC). At C = 1/γ, T - 1 is the mean number of steps before a visit to s, for the worst s. H_b is too
    small to replace T: `chain(n)` has H_b < 2 and T = n, and makes 2 an equality.
    """
    xi = expected_visits(case.mdp, case.pi_b[case.phi]).sum(1)
    P_b = np.einsum("sa,sat->st", case.pi_b[case.phi], case.mdp.P)
    T = (np.linalg.solve(np.eye(len(xi)) - gamma * C * P_b.T, xi) / xi).max()
    return 2 * C * T * case.mean_loss(lipschitz_constant(V_model, case.position), gamma)


def representation(args: Args, out_dir: Path) -> list[tuple]:
    """Section 4: the probability that a pair of states lies above K_V d̄ + ε, against δ, exactly."""
    rng = np.random.default_rng([args.seed, 4])
    C = args.bound_C or 1 / args.gamma
    epsilons = np.geomspace(1e-4, 100, 121)  # in units of δ ε, so that δ = min(1, 1/epsilons) for every policy
    delta = np.minimum(1, 1 / epsilons)
    shares, pairs = ({side: [] for side in ("behaviour", "inside", "outside")} for _ in range(2))
    for case, side, policy, pi in trials(args, rng, (args.pair_latents,)):
        V, V_model = case.values(pi, args.gamma)
        bound = pair_bound(case, 1.0 if side == "behaviour" else C, args.gamma, V_model)
        xi = expected_visits(case.mdp, case.pi_b[case.phi]).sum(1)
        z = case.position[case.phi]
        difference = np.abs(V[:, None] - V)
        allowed = lipschitz_constant(V_model, case.position) * np.abs(z[:, None] - z)
        probability = np.outer(xi, xi) / xi.sum() ** 2
        shares[side].append([probability[difference - allowed > epsilon * bound].sum() for epsilon in epsilons])
        if policy == "planner" and len(pairs[side]) < 12:
            pairs[side].append((allowed, difference))

    figure, axes = plt.subplots(1, 4, figsize=(18, 4.6), width_ratios=(1, 1, 1, 1.5))
    rows, table = [], []
    for axis, (side, share), colour in zip(axes[:3], shares.items(), ("black", BLUE, RED), strict=True):
        worst, quotients = np.max(share, axis=0), (share / delta).max(1)
        numbers = {"pairs above the line": np.mean(share, axis=0)[0], "largest share/delta": quotients.max()}
        table.append({"policies": side} | numbers | {"above delta": f"{(quotients > 1).sum()} of {len(quotients)}"})
        rows += [(4, side, "largest share above", *xy) for xy in zip(epsilons, worst, strict=True)]
        rows += [(4, side, "mean share above", *xy) for xy in zip(epsilons, np.mean(share, axis=0), strict=True)]
        allowed, difference = np.array(pairs[side]).swapaxes(0, 1)
        axis.scatter(allowed, difference, s=4, color=colour, alpha=0.3, lw=0)
        axis.plot([0, difference.max()], [0, difference.max()], color="black", ls="--", lw=1.5)
        axis.set(xlabel=r"$K_V\ \bar{d}(\phi(s_1), \phi(s_2))$", ylabel=r"$|V(s_1) - V(s_2)|$")
        axis.set(xlim=(-0.1, 2.5 * difference.max()), title=f"Pairs of states: {side}")
        axes[3].plot(epsilons, worst, color=colour, lw=2.5, label=f"{side}, worst policy")
    show(f"4. The representation, {args.n_learned} smooth MDPs, {args.pair_latents} latents, C = {C:.4g}", table)
    axes[3].plot(epsilons, delta, color="black", ls="--", lw=1.5, label="δ, the guarantee")
    axes[3].set(xscale="log", yscale="log", ylim=(1e-3, 2), title="Share of pairs above the line by more than ε")
    axes[3].set(xlabel=r"ε / $2\,C\,T\,(L_R + \gamma K_V L_P)$", ylabel="probability of a pair")
    axes[3].legend(loc="lower left")
    save(figure, out_dir / "4_representation.png")
    return rows


# ==== 5. Output and command line ====
SECTIONS = {
    "neighbourhood": neighbourhood,
    "out-of-trajectory": out_of_trajectory,
    "planning-bound": planning_bound,
    "representation": representation,
}


def show(title: str, table: list[dict[str, str | float]]) -> None:
    print(title)
    for row in (dict.fromkeys(table[0]), *table):
        cells = (name if x is None else x if isinstance(x, str) else f"{x:.4g}" for name, x in row.items())
        print("  " + "  ".join(f"{cell:>{max(13, len(name))}}" for name, cell in zip(row, cells, strict=True)))


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"  picture: {path}\n")


def check(args: Args) -> None:
    """Exit with status 2 and one line that names the first flag out of range, what was given and what is allowed."""
    sizes = ("n_mdps", "n_iterations", "n_rollouts", "n_learned", "n_episodes")
    rules = {
        "section": (args.section in ("all", *SECTIONS), ", ".join(("all", *SECTIONS))),
        "out_dir": (not Path(args.out_dir).is_file(), "a folder, new or old"),
        "seed": (args.seed >= 0, "0 or more"),
        "gamma": (0.5 < args.gamma < 1, "above 0.5 and below 1"),
        "n_states": (2 <= args.n_states <= 500, "2 to 500"),
        "n_actions": (2 <= args.n_actions <= 50, "2 to 50"),
        "termination": (0.01 <= args.termination <= 0.6, "0.01 to 0.6"),
        **{name: (1 <= getattr(args, name) <= 10**8, "1 to 100,000,000") for name in sizes},
        "Cs": (args.Cs and all(1 < C < 2 for C in args.Cs), "one or more numbers above 1 and below 2"),
        "C": (1 < args.C < 2, "above 1 and below 2"),
        "epsilons": (
            args.epsilons and all(0 < e < 1 for e in args.epsilons),
            "one or more numbers above 0 and below 1",
        ),
        "epsilon": (0 < args.epsilon < 1, "above 0 and below 1"),
        "bound_C": (
            args.bound_C is None or (args.bound_C > 1 and args.gamma * args.bound_C <= 1),
            f"above 1, at most 1/gamma = 1/{args.gamma:g}",
        ),
        "n_latents": (args.n_latents and all(1 <= n <= args.n_states for n in args.n_latents), "1 to --n-states"),
        "pair_latents": (1 <= args.pair_latents <= args.n_states, "1 to --n-states"),
    }
    for name, (fine, allowed) in rules.items():
        if not fine:
            print(f"--{name.replace('_', '-')}: got {getattr(args, name)}, allowed: {allowed}", file=sys.stderr)
            sys.exit(2)


def main() -> None:
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    check(args)
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out-dir: got {args.out_dir}, allowed: a folder that can be made ({error.strerror})", file=sys.stderr)
        sys.exit(2)
    rows = []
    for name, run in SECTIONS.items():
        if args.section in ("all", name):
            rows += run(args, out_dir)
    with (out_dir / f"{args.section}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("section", "case", "quantity", "x", "value"), *rows])
    print(f"numbers: {out_dir / args.section}.csv")


if __name__ == "__main__":
    main()
