"""The functions that ship, against plain definitions written another way."""

import math

import numpy as np
import pytest
import torch
from benchmark.plain import PlainTransitionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline

M, A = 12, 6


# ---- Generalised advantage estimation


def naive_gae(rewards, values, terminated, dones, gamma, gae_lambda):
    """Cut one environment's rows into episodes at `dones`, then sum (γλ)^i δ_{t+i} within each, one term at a time."""
    steps = len(rewards)
    advantages = np.full(steps, np.nan)  # dummy rows stay NaN: they have no advantage
    t = 0
    while t < steps:
        if dones[t]:  # a dummy row: the episode is over, the environment resets here
            t += 1
            continue
        end = t  # the episode's last real row in this rollout
        while end + 1 < steps and not dones[end + 1]:
            end += 1
        for i in range(t, end + 1):
            total = 0.0
            for j in range(i, end + 1):
                bootstrap = 0.0 if terminated[j] else gamma * values[j + 1]  # a truncated step has its true s'
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
    dones = np.zeros((steps + 1, num_envs), dtype=bool)
    dones[0] = random.random(num_envs) < end_probability
    terminated = np.zeros((steps, num_envs), dtype=bool)
    for t in range(steps):
        real = ~dones[t]  # a dummy row resets: reward 0, never an end, as EnvPool gives it
        rewards[t] *= real
        ends = real & (random.random(num_envs) < end_probability)  # a life lost, a terminal state or the time limit
        terminated[t] = ends & (random.random(num_envs) < 0.5)  # the rest are truncated
        dones[t + 1] = ends
    tensors = [torch.from_numpy(x) for x in (rewards, values, terminated, dones)]
    advantages, returns = ppo_baseline.compute_gae(*tensors, *coefficients)
    for n in range(num_envs):
        expected = naive_gae(rewards[:, n], values[:, n], terminated[:, n], dones[:, n], *coefficients)
        real = ~dones[:-1, n]
        np.testing.assert_allclose(advantages[real, n], expected[real], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(returns[real, n], expected[real] + values[:-1][real, n], rtol=1e-4, atol=1e-4)


def test_gae_bootstraps_a_truncated_step_and_not_a_terminated_one():
    rewards, values = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    dones = torch.tensor([[False, False], [True, True]])
    advantages, _ = ppo_baseline.compute_gae(rewards, values, torch.tensor([[True, False]]), dones, 0.5, 0.95)
    assert advantages.tolist() == [[1.0, 6.0]]


# ---- Losses


def smooth_l1(x, y):
    difference = abs(x - y)
    return 0.5 * difference**2 if difference < 1 else difference - 0.5


@pytest.fixture
def atari():
    """A Deep SPI agent, a minibatch with two dummy rows, latents, and noise."""
    torch.manual_seed(0)
    agent = deep_spi_ppo_atari.Agent(A, "exact", torch.Generator().manual_seed(0))
    actions = torch.tensor([0, 1, 5, 0, 3, 3, 5, 5, 1, 0, 3, 5])  # actions 2 and 4 are never taken
    batch = deep_spi_ppo_atari.Minibatch(
        actions=actions,
        rewards=torch.randint(-1, 2, (M,)).float(),
        old_log_probs=torch.randn(M, A).mul(0.1).log_softmax(-1),
        advantages=torch.randn(M) * 3 + 1,
        returns=torch.randn(M),
        mask=torch.ones(M).index_fill(0, torch.tensor([2, 7]), 0.0),
    )
    obs, next_obs = torch.randint(0, 256, (2, M, 84, 84, 4), dtype=torch.uint8)
    noise = torch.randn(M, 16, 5, 4 * 49)
    return agent, batch, obs, next_obs, noise


def deep_spi_loss(agent, batch, obs, next_obs, noise, **settings):
    return deep_spi_ppo_atari.compute_loss(
        agent,
        batch,
        agent.encode(obs),
        agent.encode(next_obs),
        noise,
        deep_spi_ppo_atari.Args(**settings),
    )


def test_losses_equal_plain_loops(atari):
    agent, batch, obs, next_obs, noise = atari
    args = deep_spi_ppo_atari.Args(reward_loss_coef=0.3, transition_loss_coef=0.01)
    with torch.no_grad():
        z, next_z = agent.encode(obs), agent.encode(next_obs)
        loss, stats = deep_spi_ppo_atari.compute_loss(agent, batch, z, next_z, noise, args)
        log_probs, values = agent.policy_and_value(z)
        predicted_rewards = agent.reward_model(z, batch.actions)
        predicted_next_z = agent.transition_model(z, batch.actions, noise)

    real = [i for i in range(M) if batch.mask[i] > 0]
    mean = sum(batch.advantages[i].item() for i in real) / len(real)
    std = math.sqrt(sum((batch.advantages[i].item() - mean) ** 2 for i in real) / len(real))
    l_r = [smooth_l1(predicted_rewards[i].item(), batch.rewards[i].item()) for i in range(M)]
    l_p = [
        sum(
            smooth_l1(x, y)
            for x, y in zip(predicted_next_z[i].flatten().tolist(), next_z[i].flatten().tolist(), strict=True)
        )
        for i in range(M)
    ]
    objective = value_loss = entropy = utilities = 0.0
    for i in real:
        utility = (batch.advantages[i].item() - mean) / (std + 1e-8) - 0.3 * l_r[i] - 0.01 * l_p[i]
        a = batch.actions[i]
        ratio = math.exp(log_probs[i, a].item() - batch.old_log_probs[i, a].item())
        objective += min(ratio * utility, min(max(ratio, 0.9), 1.1) * utility) / len(real)
        value_loss += 0.5 * (values[i].item() - batch.returns[i].item()) ** 2 / len(real)
        entropy -= sum(math.exp(x) * x for x in log_probs[i].tolist()) / len(real)
        utilities += utility / len(real)
    assert stats["losses/policy_loss"].item() == pytest.approx(-objective, rel=1e-4)
    assert stats["world_model/reward_loss"].item() == pytest.approx(sum(l_r[i] for i in real) / len(real), rel=1e-4)
    assert stats["world_model/transition_loss"].item() == pytest.approx(sum(l_p[i] for i in real) / len(real), rel=1e-4)
    assert stats["spi/utility_mean"].item() == pytest.approx(utilities, rel=1e-4)
    assert loss.item() == pytest.approx(-objective - 0.01 * entropy + 0.5 * value_loss, rel=1e-4)


def test_neighbourhood_is_measured_over_all_actions_of_real_rows(atari):
    agent, batch, obs, next_obs, noise = atari
    _, stats = deep_spi_loss(agent, batch, obs, next_obs, noise)
    with torch.no_grad():
        log_probs, _ = agent.policy_and_value(agent.encode(obs))
    ratios = [(log_probs[i] - batch.old_log_probs[i]).exp() for i in range(M) if batch.mask[i] > 0]
    flat = [ratio.item() for row in ratios for ratio in row]
    assert stats["spi/ratio_min"].item() == pytest.approx(min(flat), rel=1e-5)
    assert stats["spi/ratio_max"].item() == pytest.approx(max(flat), rel=1e-5)
    outside = sum(ratio > 1.1 or ratio < 0.9 for ratio in flat) / len(flat)
    assert 0 < outside < 1
    assert stats["spi/outside_neighbourhood"].item() == pytest.approx(outside, abs=1e-6)


def test_gradient_reaches_encoder_and_both_models_through_the_clipped_term(atari):
    agent, batch, obs, next_obs, noise = atari
    # No entropy, no value, advantages all equal, so that normalised they are 0: what is left is U = -α_R ℓ_R - α_P ℓ_P.
    batch = batch._replace(advantages=torch.zeros(M))
    loss, _ = deep_spi_loss(agent, batch, obs, next_obs, noise, ent_coef=0.0, vf_coef=0.0)
    loss.backward()
    for name in ("encoder", "reward_model", "transition_model", "actor"):
        norms = [parameter.grad.norm().item() for parameter in getattr(agent, name).parameters()]
        assert min(norms) > 0, name
    assert all(parameter.grad.norm() == 0 for parameter in agent.critic.parameters())


def test_both_ends_of_the_transition_pull_on_the_encoder(atari):
    agent, batch, obs, next_obs, noise = atari
    z = agent.encode(obs).detach().requires_grad_()
    next_z = agent.encode(next_obs).detach().requires_grad_()
    loss, _ = deep_spi_ppo_atari.compute_loss(agent, batch, z, next_z, noise, deep_spi_ppo_atari.Args())
    loss.backward()
    real = batch.mask > 0
    assert (next_z.grad[real].flatten(1).norm(dim=-1) > 0).all()
    assert (z.grad[real].flatten(1).norm(dim=-1) > 0).all()
    assert (next_z.grad[~real] == 0).all() and (z.grad[~real] == 0).all()


def dummy_rows_replaced(batch):
    """The minibatch with other contents in the rows that must not count."""
    dummy = batch.mask == 0
    return batch._replace(
        rewards=torch.where(dummy, 9.0, batch.rewards),
        advantages=torch.where(dummy, 1e3, batch.advantages),
        returns=torch.where(dummy, -1e3, batch.returns),
        old_log_probs=torch.where(dummy[:, None], -5.0, batch.old_log_probs),
    )


@pytest.mark.parametrize("method", ["deep_spi", "additive", "deepmdp", "ppo"])
def test_dummy_rows_change_nothing(atari, method):
    deep_spi_agent, batch, obs, next_obs, noise = atari
    if method == "ppo":
        agent = ppo_baseline.Agent(A)
    elif method == "deepmdp":
        agent = deepmdp_ppo_atari.Agent(A, torch.Generator().manual_seed(0))
    else:
        agent = deep_spi_agent
    other_obs, other_next_obs = obs.clone(), next_obs.clone()
    other_obs[batch.mask == 0], other_next_obs[batch.mask == 0] = 255, 7
    results = []
    for a_batch, frames, next_frames in (
        (batch, obs, next_obs),
        (dummy_rows_replaced(batch), other_obs, other_next_obs),
    ):
        agent.zero_grad()
        if method == "ppo":
            loss, stats = ppo_baseline.compute_loss(agent, a_batch, agent.encode(frames), ppo_baseline.Args())
        elif method == "deepmdp":
            z, next_z = agent.encode(frames), agent.encode(next_frames)
            loss, stats = deepmdp_ppo_atari.compute_loss(agent, a_batch, z, next_z, deepmdp_ppo_atari.Args())
        else:
            placement = "utility" if method == "deep_spi" else "additive"
            loss, stats = deep_spi_loss(agent, a_batch, frames, next_frames, noise, loss_placement=placement)
        loss.backward()
        results.append((loss.detach(), stats, [parameter.grad.clone() for parameter in agent.parameters()]))
    (loss, stats, gradients), (other_loss, other_stats, other_gradients) = results
    torch.testing.assert_close(loss, other_loss)
    for name in stats:
        torch.testing.assert_close(stats[name], other_stats[name])
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("placement", ["utility", "additive"])
def test_vanishing_coefficients_give_the_baselines_gradient(atari, placement):
    agent, batch, obs, next_obs, noise = atari
    baseline = ppo_baseline.Agent(A)
    weights = agent.state_dict()
    baseline.load_state_dict({name: weights[name] for name in baseline.state_dict()})
    loss, _ = ppo_baseline.compute_loss(baseline, batch, baseline.encode(obs), ppo_baseline.Args())
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in baseline.parameters()])

    def distance(coefficient):
        agent.zero_grad()
        deep_spi_loss(
            agent, batch, obs, next_obs, noise,
            reward_loss_coef=coefficient, transition_loss_coef=coefficient, loss_placement=placement,
        )[0].backward()  # fmt: skip
        ours = torch.cat([agent.get_parameter(name).grad.flatten() for name, _ in baseline.named_parameters()])
        return ((ours - expected).norm() / expected.norm()).item()

    assert distance(1e-2) > 1e-3  # the world model does run
    assert distance(1e-12) < 1e-6


def test_placements_differ_only_where_the_clip_bites(atari):
    """At π_new = π_old every ratio is 1, nothing is clipped: both placements have one gradient on the world model."""
    agent, batch, obs, next_obs, noise = atari
    with torch.no_grad():
        on_policy = batch._replace(old_log_probs=agent.policy_and_value(agent.encode(obs))[0])

    def reward_model_gradient(a_batch, placement):
        agent.zero_grad()
        deep_spi_loss(agent, a_batch, obs, next_obs, noise, loss_placement=placement)[0].backward()
        return agent.reward_model.hidden1.weight.grad.clone()

    same = reward_model_gradient(on_policy, "utility"), reward_model_gradient(on_policy, "additive")
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-7)
    utility, additive = reward_model_gradient(batch, "utility"), reward_model_gradient(batch, "additive")
    assert (utility - additive).norm() > 1e-2 * additive.norm()


# ---- Networks


@pytest.mark.parametrize("script, shape", [(deep_spi_ppo_atari, (7, 7, 64)), (deep_spi_ppo, (32,))])
def test_transition_model_equals_one_row_at_a_time(script, shape):
    """Rows must not be mixed up: each row alone gives the same sample, in its own place."""
    model = script.TransitionModel(5, "exact", torch.Generator().manual_seed(3))
    z, noise = torch.randn(9, *shape), torch.randn(9, *model.noise_shape)
    actions = torch.tensor([4, 0, 2, 2, 4, 0, 0, 4, 2])
    with torch.no_grad():
        together = model(z, actions, noise)
        alone = torch.cat([model(z[i : i + 1], actions[i : i + 1], noise[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_transition_model_equals_all_outputs_computed_and_one_kept():
    """The published form: every action's outputs, then a gather; values and gradients."""
    num_actions, rows = 4, 10
    model = deep_spi_ppo_atari.TransitionModel(num_actions, "exact", torch.Generator().manual_seed(3))
    plain = PlainTransitionModel(num_actions, "exact", torch.Generator().manual_seed(3))
    z, noise = torch.randn(rows, 7, 7, 64), torch.randn(rows, *model.noise_shape)
    actions = torch.randint(0, num_actions, (rows,))
    expected = plain(z, actions, noise)
    ours = model(z, actions, noise)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        difference = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert difference < 1e-4, name


def test_reward_model_keeps_the_taken_action():
    model = deep_spi_ppo_atari.RewardModel(4, "exact", torch.Generator().manual_seed(3))
    z = torch.randn(8, 7, 7, 64)
    with torch.no_grad():
        every_action = torch.stack([model(z, torch.full((8,), a)) for a in range(4)], dim=1)
        actions = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
        torch.testing.assert_close(model(z, actions), every_action.gather(1, actions[:, None]).squeeze(1))
    assert every_action.std(dim=1).min() > 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 256, 12), (16, 24, 32), (1, 64, 64), (3, 5, 9)]))
@settings(max_examples=30, deadline=None)
def test_exact_spectral_norm_is_the_largest_singular_value(seed, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    sigma = deep_spi_ppo_atari.exact_spectral_norm(matrix)
    expected = torch.linalg.svdvals(matrix.detach().double())[..., 0]
    torch.testing.assert_close(sigma.detach().double(), expected, rtol=1e-5, atol=0)
    # G = uvᵀ with unit u, v and <G, W> = σ(W): as σ(W') >= <G, W'> everywhere, that makes G a (sub)gradient of σ at W.
    sigma.sum().backward()
    spectrum = torch.linalg.svdvals(matrix.grad)
    torch.testing.assert_close(spectrum, torch.eye(spectrum.shape[-1])[0].expand_as(spectrum), rtol=0, atol=1e-4)
    torch.testing.assert_close((matrix.grad * matrix.detach()).sum((-2, -1)), sigma.detach(), rtol=1e-4, atol=0)


def test_spectral_norm_with_equal_singular_values_and_tiny_and_huge_scales():
    for scale in (1e-6, 1.0, 1e6):
        sigma = deep_spi_ppo_atari.exact_spectral_norm(scale * torch.eye(32)[None])
        assert sigma.item() == pytest.approx(scale, rel=1e-5)


def test_reward_model_is_1_lipschitz_whatever_its_weights():
    """Its gradient is no longer than 1 anywhere, though the raw weights are blown up and pushed to be steep."""
    model = deep_spi_ppo_atari.RewardModel(4, "exact", torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    z, actions = torch.randn(64, 7, 7, 64, requires_grad=True), torch.randint(0, 4, (64,))
    for _ in range(20):
        (gradient,) = torch.autograd.grad(model(z, actions).sum(), z, create_graph=True)
        norms = gradient.flatten(1).norm(dim=-1)
        assert norms.max() <= 1 + 1e-3
        optimizer.zero_grad()
        (-norms.mean()).backward()
        optimizer.step()
    assert norms.max() > 0.3  # it did become steep: the bound is not met by being flat


def test_cost_hardly_grows_with_the_number_of_actions():
    """Operations of P̄'s forward on a minibatch. σ and the mixture's logits grow with A; of the plain form all does."""

    def operations(form, num_actions):
        model = form(num_actions, "exact", torch.Generator().manual_seed(3))
        z, noise = torch.randn(256, 7, 7, 64), torch.randn(256, *model.noise_shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(z, torch.arange(256) % num_actions, noise)
        return counter.get_total_flops()

    ours = deep_spi_ppo_atari.TransitionModel
    assert operations(ours, 18) < 1.3 * operations(ours, 4)
    assert operations(PlainTransitionModel, 18) > 3 * operations(PlainTransitionModel, 4)


def test_latents_are_bf16_and_losses_float32_under_autocast(atari):
    agent, batch, obs, next_obs, noise = atari
    with torch.autocast("cpu", torch.bfloat16):
        z = agent.encode(obs)
        assert z.dtype == agent.transition_model(z, batch.actions, noise).dtype == torch.bfloat16
        assert agent.reward_model(z, batch.actions).dtype == torch.float32
        assert all(output.dtype == torch.float32 for output in agent.policy_and_value(z))
        loss, stats = deep_spi_loss(agent, batch, obs, next_obs, noise)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in stats.values())


def test_group_sort_sorts_pairs():
    x = torch.tensor([[3.0, 1.0, -2.0, 5.0, 4.0, 4.0]])
    assert deep_spi_ppo_atari.group_sort(x).tolist() == [[1.0, 3.0, -2.0, 5.0, 4.0, 4.0]]
