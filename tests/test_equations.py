"""The functions that ship, against plain definitions written another way."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline
from benchmark.peers.plain import PlainTransitionModel

B, L, A = 6, 2, 6  # chunks, steps of each, actions
M = B * L
SPI_SCRIPTS = [deep_spi_ppo_atari, deep_spi_ppo]
MODEL_SCRIPTS = [*SPI_SCRIPTS, deepmdp_ppo_atari]
SCRIPTS = [ppo_baseline, *MODEL_SCRIPTS]


# ---- Generalised advantage estimation


def naive_gae(rewards, values, is_terminal, is_last, gamma, gae_lambda):
    """Cut one environment's rows into episodes at `is_last`, then sum (γλ)^i δ_{t+i} within each, term by term."""
    steps = len(rewards)
    advantages = np.full(steps, np.nan)  # dummy rows stay NaN: they have no advantage
    t = 0
    while t < steps:
        if is_last[t]:  # a dummy row: the episode is over, the environment resets here
            t += 1
            continue
        end = t  # the episode's last real row in this rollout
        while end + 1 < steps and not is_last[end + 1]:
            end += 1
        for i in range(t, end + 1):
            total = 0.0
            for j in range(i, end + 1):
                bootstrap = 0.0 if is_terminal[j + 1] else gamma * values[j + 1]  # a truncated step has its true s'
                total += (gamma * gae_lambda) ** (j - i) * (rewards[j] + bootstrap - values[j])
            advantages[i] = total
        t = end + 1
    return advantages


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 20),
    st.floats(0.0, 0.6),
    st.sampled_from([(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)]),
)
@settings(max_examples=60, deadline=None)
def test_gae_equals_the_per_episode_definition(seed, steps, end_probability, coefficients):
    random = np.random.default_rng(seed)
    num_envs = 3
    rewards = random.normal(size=(steps, num_envs)).astype(np.float32)
    values = random.normal(size=(steps + 1, num_envs)).astype(np.float32)
    is_last = np.zeros((steps + 1, num_envs), dtype=bool)
    is_last[0] = random.random(num_envs) < end_probability
    is_terminal = is_last & (random.random(is_last.shape) < 0.5)
    for t in range(steps):
        real = ~is_last[t]  # a dummy row resets: reward 0, never an end, as EnvPool gives it
        rewards[t] *= real
        is_last[t + 1] = real & (random.random(num_envs) < end_probability)  # a life lost, the game or the time over
        is_terminal[t + 1] = is_last[t + 1] & (random.random(num_envs) < 0.5)  # the rest are truncated
    tensors = [torch.from_numpy(x) for x in (rewards, values, is_terminal, is_last)]
    advantages, returns = ppo_baseline.compute_gae(*tensors, *coefficients)
    for n in range(num_envs):
        expected = naive_gae(rewards[:, n], values[:, n], is_terminal[:, n], is_last[:, n], *coefficients)
        real = ~is_last[:-1, n]
        np.testing.assert_allclose(advantages[real, n], expected[real], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(returns[real, n], expected[real] + values[:-1][real, n], rtol=1e-4, atol=1e-4)


def test_gae_bootstraps_a_truncated_step_and_not_a_terminated_one():
    rewards, values = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    is_last = torch.tensor([[False, False], [True, True]])
    is_terminal = torch.tensor([[False, False], [True, False]])
    advantages, _ = ppo_baseline.compute_gae(rewards, values, is_terminal, is_last, 0.5, 0.95)
    assert advantages.tolist() == [[1.0, 6.0]]


# ---- Losses


# ---- Losses


def smooth_l1(x, y):
    difference = abs(x - y)
    return 0.5 * difference**2 if difference < 1 else difference - 0.5


def make_agent(script, seed=0):
    """An agent for A actions, and for vectors of 5 numbers where the script has vectors."""
    torch.manual_seed(seed)
    return script.Agent(*([5] if script is deep_spi_ppo else []), A)


def make_batch(script, **changes):
    """A minibatch with two dummy rows, 2 and 7: the first step of a chunk and the last of another."""
    torch.manual_seed(1)
    frames = L + (script is not ppo_baseline)  # with a world model, the last s' too
    if script is deep_spi_ppo:
        obs = torch.randn(B, frames, 5)
    else:
        obs = torch.randint(0, 256, (B, frames, 84, 84, 4), dtype=torch.uint8)
    batch = script.Transitions(
        obs=obs,
        actions=torch.tensor([0, 1, 5, 0, 3, 3, 5, 5, 1, 0, 3, 5]),  # actions 2 and 4 are never taken
        rewards=torch.randint(-1, 2, (M,)).float(),
        old_log_probs=torch.randn(M, A).mul(0.1).log_softmax(-1),
        advantages=torch.randn(M) * 3 + 1,
        returns=torch.randn(M),
        mask=torch.ones(M).index_fill(0, torch.tensor([2, 7]), 0.0),
    )
    return batch._replace(**changes)


def make_noise(agent):
    """P̄'s noise, as `train` draws it."""
    return torch.randn(M, *agent.transition_model.noise_shape).clamp(-1, 1)


def single_steps(batch):
    """The same rows as chunks of one step each: every row has an s and an s' of its own."""
    return batch._replace(obs=torch.stack((batch.obs[:, :-1].flatten(0, 1), batch.obs[:, 1:].flatten(0, 1)), dim=1))


def compute_loss(script, agent, batch, noise=None, **settings):
    """The script's own, with its defaults but for `settings`. Without noise Deep SPI is PPO; others know none."""
    return script.compute_loss(agent, batch, script.Args(**settings), *([noise] if script in SPI_SCRIPTS else []))


@pytest.mark.parametrize("script", MODEL_SCRIPTS)
def test_latents_are_the_two_ends_of_each_transition(script):
    agent, batch = make_agent(script), make_batch(script)
    with torch.no_grad():
        z, next_z = script.latents(agent, batch)
        assert len(z) == len(next_z) == M
        for row in range(M):
            chunk, step = divmod(row, L)
            for ours, frame in ((z, batch.obs[chunk, step]), (next_z, batch.obs[chunk, step + 1])):
                torch.testing.assert_close(ours[row], agent.encode(frame[None])[0], rtol=1e-4, atol=1e-5)
        for ours, other in zip((z, next_z), script.latents(agent, single_steps(batch)), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def mean_of_real(batch, values):
    """Of a list with one number a row, in plain Python."""
    real = [value for value, mask in zip(values, batch.mask.tolist(), strict=True) if mask > 0]
    return sum(real) / len(real)


@pytest.mark.parametrize(
    "script, placement",
    [(script, placement) for script in SPI_SCRIPTS for placement in ("utility", "additive", "gated")]
    + [(deepmdp_ppo_atari, "additive")],
)
def test_losses_equal_plain_loops(script, placement):
    agent, batch = make_agent(script), make_batch(script)
    settings = {"reward_loss_coef": 0.3, "transition_loss_coef": 0.01, "ent_coef": 0.02, "clip_coef": 0.1}
    settings |= {"loss_placement": placement} if script in SPI_SCRIPTS else {"gradient_penalty_coef": 0.0}
    noise = (make_noise(agent),) if script in SPI_SCRIPTS else ()
    with torch.no_grad():
        loss, stats = compute_loss(script, agent, batch, *noise, **settings)
        z, next_z = script.latents(agent, batch)
        log_probs, values = agent.policy_and_value(z)
        predicted_rewards = agent.reward_model(z, batch.actions)
        predicted_next_z = agent.transition_model(z, batch.actions, *noise)

    mean = mean_of_real(batch, batch.advantages.tolist())
    std = math.sqrt(mean_of_real(batch, [(x - mean) ** 2 for x in batch.advantages.tolist()]))
    l_r = [smooth_l1(predicted_rewards[i].item(), batch.rewards[i].item()) for i in range(M)]
    pairs = [zip(predicted_next_z[i].flatten().tolist(), next_z[i].flatten().tolist(), strict=True) for i in range(M)]
    l_p = [sum(smooth_l1(x, y) for x, y in row) for row in pairs]
    if script is deepmdp_ppo_atari:  # a mean over the latent
        l_p = [total / next_z[0].numel() for total in l_p]
    penalties = [0.3 * l_r[i] + 0.01 * l_p[i] for i in range(M)]
    objective, value_loss, entropy = [], [], []
    for i in range(M):
        utility = (batch.advantages[i].item() - mean) / (std + 1e-8) - (placement != "additive") * penalties[i]
        a = batch.actions[i]
        ratio = math.exp(log_probs[i, a].item() - batch.old_log_probs[i, a].item())
        objective.append(min(ratio * utility, min(max(ratio, 0.9), 1.1) * utility))
        value_loss.append(0.5 * (values[i].item() - batch.returns[i].item()) ** 2)
        entropy.append(-sum(math.exp(x) * x for x in log_probs[i].tolist()))
    expected = {
        "losses/policy_loss": -mean_of_real(batch, objective),
        "losses/value_loss": mean_of_real(batch, value_loss),
        "losses/entropy": mean_of_real(batch, entropy),
        "world_model/reward_loss": mean_of_real(batch, l_r),
        "world_model/transition_loss": mean_of_real(batch, l_p),
    }
    if script in SPI_SCRIPTS:
        expected["spi/penalty_mean"] = mean_of_real(batch, penalties)
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    total = expected["losses/policy_loss"] - 0.02 * expected["losses/entropy"] + 0.5 * expected["losses/value_loss"]
    total += (placement == "additive") * mean_of_real(batch, penalties)
    assert loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("script", MODEL_SCRIPTS)
def test_what_the_model_knows_equals_plain_loops(script):
    """ℓ_P of P̄'s mean and of copying z, their ratio; ℓ_R of always predicting 0; the spread of z."""
    agent, batch = make_agent(script), make_batch(script)
    with torch.no_grad():
        metrics = script.what_the_model_knows(agent, batch)
        z, next_z = script.latents(agent, batch)
        noise = (torch.zeros(M, *agent.transition_model.noise_shape),) if script in SPI_SCRIPTS else ()
        predicted = agent.transition_model(z, batch.actions, *noise)
    rows = [[tensor[i].flatten().tolist() for i in range(M)] for tensor in (z, next_z, predicted)]
    size = len(rows[0][0])

    def transition_losses(predictions):
        per_row = [sum(map(smooth_l1, x, y)) for x, y in zip(predictions, rows[1], strict=True)]
        return [total / size for total in per_row] if script is deepmdp_ppo_atari else per_row

    mean, copy = (mean_of_real(batch, transition_losses(predictions)) for predictions in (rows[2], rows[0]))
    real = [row for row, counts in zip(rows[0], batch.mask.tolist(), strict=True) if counts]
    columns = [[row[d] for row in real] for d in range(size)]
    centres = [sum(column) / len(real) for column in columns]
    variances = [
        sum((x - centre) ** 2 for x in column) / len(real) for column, centre in zip(columns, centres, strict=True)
    ]
    expected = {
        "world_model/transition_loss_mean": mean,
        "world_model/transition_loss_copy": copy,
        "world_model/transition_loss_ratio": mean / copy,
        "world_model/reward_loss_zero": mean_of_real(batch, [smooth_l1(0.0, x) for x in batch.rewards.tolist()]),
        "world_model/latent_variance": sum(variances) / size,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0 and metrics[name].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("script", MODEL_SCRIPTS)
def test_what_the_model_knows_where_nothing_moves(script):
    """s' is s: copying is perfect, and the ratio is a number still."""
    agent, batch = make_agent(script), make_batch(script)
    batch = batch._replace(obs=batch.obs[:, :1].expand_as(batch.obs), rewards=torch.zeros(M))
    with torch.no_grad():
        metrics = script.what_the_model_knows(agent, batch)
    assert metrics["world_model/transition_loss_copy"] == metrics["world_model/reward_loss_zero"] == 0
    assert all(value.isfinite() for value in metrics.values())


def test_perfect_model_has_ratio_0(monkeypatch):
    agent, batch = make_agent(deep_spi_ppo), make_batch(deep_spi_ppo)
    _, next_z = deep_spi_ppo.latents(agent, batch)
    monkeypatch.setattr(agent.transition_model, "forward", lambda *_: next_z)
    metrics = deep_spi_ppo.what_the_model_knows(agent, batch)
    assert metrics["world_model/transition_loss_ratio"] == 0 < metrics["world_model/transition_loss_copy"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_neighbourhood_is_measured_over_all_actions_of_real_rows(script):
    agent, batch = make_agent(script), make_batch(script)
    noise = (make_noise(agent),) if script in SPI_SCRIPTS else ()
    _, stats = compute_loss(script, agent, batch, *noise, clip_coef=0.1)
    with torch.no_grad():
        log_probs, _ = agent.policy_and_value(agent.encode(batch.obs[:, :L].flatten(0, 1)))
    ratios = (log_probs - batch.old_log_probs).exp()
    real = batch.mask > 0
    torch.testing.assert_close(stats["spi/ratios"][real], ratios[real], rtol=1e-4, atol=0)
    assert (stats["spi/ratios"][~real] == 1).all()  # so that a dummy row is in no smallest or largest ratio
    flat = ratios[real].flatten().tolist()
    outside = sum(ratio > 1.1 or ratio < 0.9 for ratio in flat) / len(flat)
    assert 0 < outside < 1
    assert stats["spi/outside_neighbourhood"].item() == pytest.approx(outside, abs=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dummy_rows_alone_are_nothing(script):
    """Every mean over no rows is 0, nothing is outside the neighbourhood, and no parameter is pulled."""
    agent, batch = make_agent(script), make_batch(script, mask=torch.zeros(M))
    noise = (make_noise(agent),) if script in SPI_SCRIPTS else ()
    loss, stats = compute_loss(script, agent, batch, *noise)
    loss.backward()
    assert (stats.pop("spi/ratios") == 1).all()
    assert loss == 0 and all(value == 0 for value in stats.values()), stats
    assert all((parameter.grad == 0).all() for parameter in agent.parameters())


@pytest.mark.parametrize("script", SPI_SCRIPTS)
def test_gradient_reaches_encoder_and_both_models_through_the_clipped_term(script):
    # No entropy, no value, advantages all equal, so that normalised they are 0: what is left is U = -α_R ℓ_R - α_P ℓ_P.
    agent, batch = make_agent(script), make_batch(script, advantages=torch.zeros(M))
    loss, _ = compute_loss(script, agent, batch, make_noise(agent), ent_coef=0.0, vf_coef=0.0)
    loss.backward()
    for name in ("encoder", "reward_model", "transition_model", "actor"):
        norms = [parameter.grad.norm().item() for parameter in getattr(agent, name).parameters()]
        assert min(norms) > 0, name
    assert all(parameter.grad.norm() == 0 for parameter in agent.critic.parameters())


@pytest.mark.parametrize("script", MODEL_SCRIPTS)
def test_both_ends_of_the_transition_pull_on_the_encoder(script, monkeypatch):
    agent, batch = make_agent(script), make_batch(script)
    z, next_z = (latent.detach().requires_grad_() for latent in script.latents(agent, batch))
    monkeypatch.setattr(script, "latents", lambda *_: (z, next_z))
    noise = (make_noise(agent),) if script in SPI_SCRIPTS else ()
    compute_loss(script, agent, batch, *noise)[0].backward()
    real = batch.mask > 0
    assert (next_z.grad[real].flatten(1).norm(dim=-1) > 0).all()
    assert (z.grad[real].flatten(1).norm(dim=-1) > 0).all()
    assert (next_z.grad[~real] == 0).all() and (z.grad[~real] == 0).all()


def dummy_rows_replaced(batch):
    """The minibatch of single steps with other contents in the rows that must not count."""
    dummy = batch.mask == 0
    obs = batch.obs.clone()
    obs[dummy] = 255 if obs.dtype == torch.uint8 else 9.0
    return batch._replace(
        obs=obs,
        rewards=torch.where(dummy, 9.0, batch.rewards),
        advantages=torch.where(dummy, 1e3, batch.advantages),
        returns=torch.where(dummy, -1e3, batch.returns),
        old_log_probs=torch.where(dummy[:, None], -5.0, batch.old_log_probs),
    )


METHODS = {
    "ppo": (ppo_baseline, {}),
    "deepmdp": (deepmdp_ppo_atari, {}),
    **{name: (deep_spi_ppo_atari, {"loss_placement": name}) for name in ("utility", "additive", "gated")},
    "vector": (deep_spi_ppo, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_dummy_rows_change_nothing(method):
    script, settings = METHODS[method]
    agent, batch = make_agent(script), make_batch(script)
    batch = single_steps(batch) if script is not ppo_baseline else batch._replace(obs=batch.obs.flatten(0, 1)[:, None])
    noise = (make_noise(agent),) if script in SPI_SCRIPTS else ()
    results = []
    for a_batch in (batch, dummy_rows_replaced(batch)):
        agent.zero_grad()
        loss, stats = compute_loss(script, agent, a_batch, *noise, **settings)
        loss.backward()
        results.append((loss.detach(), stats, [parameter.grad.clone() for parameter in agent.parameters()]))
    (loss, stats, gradients), (other_loss, other_stats, other_gradients) = results
    torch.testing.assert_close(loss, other_loss)
    for name in stats:
        torch.testing.assert_close(stats[name], other_stats[name])
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-6)


def baseline_with_weights_of(agent):
    baseline = make_agent(ppo_baseline)
    weights = agent.state_dict()
    baseline.load_state_dict({name: weights[name] for name in baseline.state_dict()})
    return baseline


def gradient_of_baseline(agent):
    """Of ppo_baseline's loss, at an agent's weights and on its batch: loss, stats, gradient, names."""
    baseline, batch = baseline_with_weights_of(agent), make_batch(deep_spi_ppo_atari)
    loss, stats = compute_loss(ppo_baseline, baseline, batch._replace(obs=batch.obs[:, :L]))
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in baseline.parameters()])
    return loss, stats, gradient, [name for name, _ in baseline.named_parameters()]


@pytest.mark.parametrize("placement", ["utility", "additive", "gated"])
def test_vanishing_coefficients_give_the_baselines_gradient(placement):
    agent, batch = make_agent(deep_spi_ppo_atari), make_batch(deep_spi_ppo_atari)
    noise = make_noise(agent)
    _, _, expected, names = gradient_of_baseline(agent)

    def distance(coefficient):
        agent.zero_grad()
        compute_loss(
            deep_spi_ppo_atari, agent, batch, noise,
            reward_loss_coef=coefficient, transition_loss_coef=coefficient, loss_placement=placement,
        )[0].backward()  # fmt: skip
        ours = torch.cat([agent.get_parameter(name).grad.flatten() for name in names])
        return ((ours - expected).norm() / expected.norm()).item()

    assert distance(1e-2) > 1e-3  # the world model does run
    assert distance(1e-12) < 1e-6


def test_without_noise_deep_spi_is_the_baseline():
    agent, batch = make_agent(deep_spi_ppo_atari), make_batch(deep_spi_ppo_atari)
    loss, stats, gradient, names = gradient_of_baseline(agent)
    ours, our_stats = compute_loss(
        deep_spi_ppo_atari, agent, batch._replace(obs=batch.obs[:, :L]), reward_loss_coef=1.0
    )
    ours.backward()
    assert ours == loss and our_stats.keys() == stats.keys()
    assert all(torch.equal(our_stats[name], stats[name]) for name in stats)
    assert torch.equal(torch.cat([agent.get_parameter(name).grad.flatten() for name in names]), gradient)
    assert all(parameter.grad is None for name, parameter in agent.named_parameters() if "_model" in name)


@pytest.mark.parametrize("script", SPI_SCRIPTS)
def test_placements_differ_only_where_the_clip_bites(script):
    """At π_new = π_old every ratio is 1, nothing is clipped: the placements have one gradient on the world model."""
    agent, batch = make_agent(script), make_batch(script)
    noise = make_noise(agent)
    with torch.no_grad():
        on_policy = batch._replace(old_log_probs=agent.policy_and_value(script.latents(agent, batch)[0])[0])

    def reward_model_gradient(a_batch, placement):
        agent.zero_grad()
        compute_loss(script, agent, a_batch, noise, loss_placement=placement, clip_coef=0.1)[0].backward()
        return agent.reward_model.hidden1.weight.grad.clone()

    utility, additive, gated = (reward_model_gradient(on_policy, name) for name in ("utility", "additive", "gated"))
    torch.testing.assert_close(utility, additive, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(utility, gated, rtol=1e-4, atol=1e-7)
    utility, additive, gated = (reward_model_gradient(batch, name) for name in ("utility", "additive", "gated"))
    assert (utility - additive).norm() > 1e-2 * additive.norm()
    assert (utility - gated).norm() > 1e-2 * utility.norm()


# ---- The clip


def pulls(script, monkeypatch, placement, which, coefficient, advantages, ratios, losses):
    """How hard compute_loss pulls each row's ℓ down, in units of α: -∂J/∂ℓ / α. `which` of the two, "reward_loss", ...

    The networks are replaced by what they put out: policies with these ratios, and losses ℓ of these sizes. The
    advantages have mean 0 and standard deviation 1, so that they are normalised already.
    """
    rows = len(ratios)
    old_log_probs = torch.full((rows, 2), 0.5).log()
    log_probs = old_log_probs.clone()
    log_probs[:, 1] += torch.tensor(ratios).log()
    ell = torch.tensor(losses, requires_grad=True)
    for name in ("reward_loss", "transition_loss"):
        monkeypatch.setattr(script, name, lambda *_, name=name: ell if name == which else torch.zeros(rows))
    agent = SimpleNamespace(
        encode=lambda obs: obs,
        policy_and_value=lambda z: (log_probs, torch.zeros(rows)),
        reward_model=lambda z, actions: None,
        transition_model=lambda z, actions, noise: None,
    )
    zeros, ones = torch.zeros(rows), torch.ones(rows)
    batch = script.Transitions(
        torch.zeros(rows, 2, 3), ones.long(), zeros, old_log_probs, torch.tensor(advantages), zeros, ones
    )
    settings = {f"{which}_coef": coefficient, "loss_placement": placement, "clip_coef": 0.1}
    compute_loss(script, agent, batch, zeros, ent_coef=0.0, vf_coef=0.0, **settings)[0].backward()
    return (ell.grad * rows / coefficient).tolist()


CLIP_ROWS = {"A": [1.0, -1.0, -1.0, 1.0, 1.0, -1.0], "r": [2.0, 0.5, 2.0, 0.5, 1.05, 0.95]}
PULLS = {  # the first three are those that a reader would not expect of a clip
    "utility": [1.10, 0.90, 2.00, 0.50, 1.05, 0.95],
    "additive": [1.0] * 6,
    "gated": [0.0, 0.0, 2.00, 0.50, 1.05, 0.95],
}


@pytest.mark.parametrize("script", SPI_SCRIPTS)
@pytest.mark.parametrize("which", ["reward_loss", "transition_loss"])
@pytest.mark.parametrize("placement", PULLS)
def test_what_the_clip_does_to_the_pull_on_the_losses(script, which, placement, monkeypatch):
    """Never 0 in the utility: 1 ± ε where the clip is active, r elsewhere. Beside the objective: 1. Gated: 0 and r."""
    losses = [0.3, 0.1, 2.0, 0.7, 0.2, 1.0]
    ours = pulls(script, monkeypatch, placement, which, 0.01, CLIP_ROWS["A"], CLIP_ROWS["r"], losses)
    assert ours == pytest.approx(PULLS[placement], rel=1e-5)


def test_it_is_the_utility_that_decides_whether_the_clip_is_active(monkeypatch):
    """With losses as large as advantages: U's sign counts, not A's."""
    random, alpha = np.random.default_rng(0), 0.5
    advantages = random.normal(size=200)
    advantages = ((advantages - advantages.mean()) / advantages.std()).astype(np.float32).tolist()
    ratios = np.exp(random.normal(0, 0.2, 200)).astype(np.float32).tolist()
    losses = random.exponential(1.0, 200).astype(np.float32).tolist()
    expected = {"utility": [], "gated": []}
    for a, r, ell in zip(advantages, ratios, losses, strict=True):
        u = a - alpha * ell
        clipped = min(max(r, 0.9), 1.1)
        is_active = clipped * u < r * u
        expected["utility"].append(clipped if is_active else r)
        expected["gated"].append(0.0 if is_active else r)
    turned = [a > 0 > a - alpha * ell for a, ell in zip(advantages, losses, strict=True)]
    assert sum(turned) > 20 and 20 < expected["gated"].count(0.0) < 180
    for placement in expected:
        ours = pulls(deep_spi_ppo, monkeypatch, placement, "reward_loss", alpha, advantages, ratios, losses)
        assert ours == pytest.approx(expected[placement], rel=1e-4)


# ---- Explained variance


def test_explained_variance_equals_the_plain_definition():
    random = np.random.default_rng(0)
    values, returns = random.normal(size=(2, 50)).astype(np.float32)
    returns += 2 * values
    real = random.random(50) < 0.7
    ours = ppo_baseline.explained_variance(*map(torch.from_numpy, (values, returns, real.astype(np.float32))))
    expected = 1 - np.var((returns - values)[real]) / np.var(returns[real])
    assert 0.1 < expected < 0.9 and ours.item() == pytest.approx(expected, rel=1e-5)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_explained_variance_of_constant_returns_is_0(constant, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, generator=generator) < 0.8).float()  # perhaps no row is real
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ppo_baseline.explained_variance(
            torch.randn(rows, generator=generator), torch.full((rows,), constant), mask
        )
    assert ours.item() == 0


# ---- Networks


@pytest.mark.parametrize("script, shape", [(deep_spi_ppo_atari, (7, 7, 64)), (deep_spi_ppo, (32,))])
def test_transition_model_equals_one_row_at_a_time(script, shape):
    """Rows must not be mixed up: each row alone gives the same sample, in its own place."""
    torch.manual_seed(3)
    model = make_agent(script).transition_model
    z, noise = torch.randn(9, *shape), torch.randn(9, *model.noise_shape)
    actions = torch.tensor([4, 0, 2, 2, 4, 0, 0, 4, 2])
    with torch.no_grad():
        together = model(z, actions, noise)
        alone = torch.cat([model(z[i : i + 1], actions[i : i + 1], noise[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent_shape", [(7, 7, 64), (5, 6, 32)])
def test_transition_model_equals_all_outputs_computed_and_one_kept(latent_shape):
    """The published form: every action's outputs, then a gather; values and gradients. Of another encoder too."""
    num_actions, rows = 4, 10
    models = []
    for form in (deep_spi_ppo_atari.TransitionModel, PlainTransitionModel):
        torch.manual_seed(3)
        models.append(form(latent_shape, num_actions))
    model, plain = models
    z, noise = torch.randn(rows, *latent_shape), torch.randn(rows, *model.noise_shape).clamp(-1, 1)
    actions = torch.randint(0, num_actions, (rows,))
    expected = plain(z, actions, noise)
    ours = model(z, actions, noise)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        difference = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert difference < 1e-4, name


def test_vector_transition_model_equals_plain_loops():
    """z̄' = Σ_k w_k (½ x_k + ½ softplus(y_k) ε_k), number by number."""
    torch.manual_seed(3)
    model = deep_spi_ppo.TransitionModel(32, A)
    z, actions, noise = torch.randn(3, 32), torch.tensor([4, 0, 4]), torch.randn(3, 32, 5).clamp(-1, 1)
    with torch.no_grad():
        ours = model(z, actions, noise)
        hidden = z @ model.hidden.normalized_weight().mT + model.hidden.bias
        hidden = hidden.unflatten(1, (-1, 2)).sort(dim=2).values.flatten(1)
        outputs = hidden @ model.components.normalized_weight().mT + model.components.bias
        logits = hidden @ model.mixture.normalized_weight().mT + model.mixture.bias
    for row, a in enumerate(actions.tolist()):
        scores = [math.exp(logits[row, k * A + a]) for k in range(5)]
        for d in range(32):
            total = 0.0
            for k in range(5):
                x, y = (outputs[row, ((d * 5 + k) * 2 + which) * A + a].item() for which in range(2))
                sample = 0.5 * x + 0.5 * math.log1p(math.exp(y)) * noise[row, d, k].item()
                total += scores[k] / sum(scores) * sample
            assert ours[row, d].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_reward_model_keeps_the_taken_action():
    torch.manual_seed(3)
    model = deep_spi_ppo_atari.RewardModel(3136, 4)
    z = torch.randn(8, 7, 7, 64)
    with torch.no_grad():
        every_action = torch.stack([model(z, torch.full((8,), a)) for a in range(4)], dim=1)
        actions = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
        torch.testing.assert_close(model(z, actions), every_action.gather(1, actions[:, None]).squeeze(1))
    assert every_action.std(dim=1).min() > 0


LAYERS = [((256, 12), 1), ((16 * 24, 8, 2, 2), 16), ((64, 64), 1), ((15, 9), 3)]


def spectral_norms(weight, groups):
    """The largest singular value of each group's matrix, by LAPACK in float64."""
    return torch.linalg.svdvals(weight.detach().double().reshape(groups, len(weight) // groups, -1))[:, 0]


@given(st.integers(0, 2**32 - 1), st.sampled_from(LAYERS))
@settings(max_examples=30, deadline=None)
def test_spectral_layer_divides_by_the_largest_singular_value(seed, layer):
    shape, groups = layer
    torch.manual_seed(seed)
    layer = deep_spi_ppo_atari.SpectralLayer(*shape, groups=groups)
    normalized = layer.normalized_weight()
    assert normalized.shape == shape
    sigma = layer.matrices().norm(dim=(1, 2)) / normalized.view_as(layer.matrices()).norm(dim=(1, 2))
    expected = spectral_norms(layer.weight, groups)
    torch.testing.assert_close(sigma.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(spectral_norms(normalized, groups), torch.ones_like(expected), rtol=1e-5, atol=0)
    # G = uvᵀ with unit u, v and <G, W> = σ(W): as σ(W') >= <G, W'> everywhere, that makes G a (sub)gradient of σ at W.
    (gradient,) = torch.autograd.grad(sigma.sum(), layer.weight)
    gradient = gradient.view_as(layer.matrices())
    spectrum = torch.linalg.svdvals(gradient)
    torch.testing.assert_close(spectrum, torch.eye(spectrum.shape[-1])[0].expand_as(spectrum), rtol=0, atol=1e-4)
    inner = (gradient * layer.matrices()).sum((-2, -1))
    torch.testing.assert_close(inner.detach(), sigma.detach(), rtol=1e-4, atol=0)


def test_spectral_norm_with_equal_singular_values_and_tiny_and_huge_scales():
    layer = deep_spi_ppo_atari.SpectralLayer(32, 32)
    for scale in (1e-6, 1.0, 1e6):
        with torch.no_grad():
            layer.weight.copy_(scale * torch.eye(32))
        layer.follow()
        assert spectral_norms(layer.normalized_weight(), 1).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("shape, groups", LAYERS)
def test_spectral_layer_follows_its_weight(shape, groups):
    """64 steps of Adam that lift other singular values above the largest, at the vector script's large step size."""
    torch.manual_seed(3)
    layer = deep_spi_ppo_atari.SpectralLayer(*shape, groups=groups)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3, eps=1e-5)
    target, start, turned = torch.randn(shape), layer.weight.detach().clone(), layer.u.clone()
    for _ in range(64):
        before = layer.u.clone()
        loss = (layer.normalized_weight() * (target + torch.randn(shape))).sum()
        optimizer.zero_grad()
        loss.backward()
        assert torch.equal(before, layer.u)  # neither forward nor backward moves it
        optimizer.step()
        layer.follow()
        norms = spectral_norms(layer.normalized_weight(), groups)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-3)
    assert (layer.weight - start).norm() > 0.2 * start.norm()
    assert (turned * layer.u).sum(1).abs().min() < 0.9  # the direction is another by now


@pytest.mark.parametrize("script, size", [(deep_spi_ppo_atari, 3136), (deep_spi_ppo, 32)])
def test_reward_model_is_1_lipschitz_whatever_its_weights(script, size):
    """Its gradient is no longer than 1 anywhere, though the raw weights are blown up and pushed to be steep."""
    torch.manual_seed(3)
    model = script.RewardModel(size, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    z, actions = torch.randn(64, size, requires_grad=True), torch.randint(0, 4, (64,))
    for _ in range(20):
        (gradient,) = torch.autograd.grad(model(z, actions).sum(), z, create_graph=True)
        norms = gradient.norm(dim=-1)
        assert norms.max() <= 1 + 1e-3
        optimizer.zero_grad()
        (-norms.mean()).backward()
        optimizer.step()
        for layer in model.children():
            layer.follow()
    assert norms.max() > 0.3  # it did become steep: the bound is not met by being flat


def test_cost_hardly_grows_with_the_number_of_actions():
    """Operations of P̄'s forward on a minibatch. σ and the mixture's logits grow with A; of the plain form all does."""

    def operations(form, num_actions):
        model = form((7, 7, 64), num_actions)
        z, noise = torch.randn(256, 7, 7, 64), torch.randn(256, *model.noise_shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(z, torch.arange(256) % num_actions, noise)
        return counter.get_total_flops()

    ours = deep_spi_ppo_atari.TransitionModel
    assert operations(ours, 18) < 1.3 * operations(ours, 4)
    assert operations(PlainTransitionModel, 18) > 3 * operations(PlainTransitionModel, 4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_float32_under_autocast(script):
    agent, batch = make_agent(script), make_batch(script)
    noise = (make_noise(agent).bfloat16(),) if script in SPI_SCRIPTS else ()
    with torch.autocast("cpu", torch.bfloat16):
        z = agent.encode(batch.obs[:, :L].flatten(0, 1))
        assert all(output.dtype == torch.float32 for output in agent.policy_and_value(z))
        if script is not deep_spi_ppo:
            assert z.dtype == torch.bfloat16
        if script is not ppo_baseline:
            assert agent.reward_model(z, batch.actions).dtype == torch.float32
            predicted = agent.transition_model(z, batch.actions, *noise)
            assert predicted.dtype == (torch.float32 if script is deep_spi_ppo else torch.bfloat16)
            metrics = script.what_the_model_knows(agent, batch)
            assert all(value.dtype == torch.float32 for value in metrics.values())
        loss, stats = compute_loss(script, agent, batch, *noise)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in stats.values())


def test_group_sort_sorts_pairs():
    x = torch.tensor([[3.0, 1.0, -2.0, 5.0, 4.0, 4.0]])
    assert deep_spi_ppo_atari.group_sort(x).tolist() == [[1.0, 3.0, -2.0, 5.0, 4.0, 4.0]]


@pytest.mark.parametrize("script", [deep_spi_ppo_atari, deepmdp_ppo_atari])
def test_world_model_leaves_the_other_draws_alone(script):
    """The agents of the siblings start from the same weights, and the next draw is the same."""
    agent = make_agent(script)
    after = torch.rand(1)
    baseline = make_agent(ppo_baseline)
    assert torch.equal(after, torch.rand(1))
    for name, tensor in baseline.state_dict().items():
        assert torch.equal(tensor, agent.state_dict()[name]), name
