"""DreamSPI's parity with the published code's numbers, and proof that it would notice a difference."""

import numpy as np
import pytest

import dream_spi_atari
from tests import parity
from tests.test_parity import GOLDEN, altered, first_difference

CASE = GOLDEN / "dreamspi_a6.npz"
MISTAKES = {
    "z' detached": ("z[:, 1:].flatten(0, 1)  # (M, V, C)", "z[:, 1:].flatten(0, 1).detach()"),
    "z detached for the world model": (
        "agent.transition_model(z, batch.actions, noise), next_z)",
        "agent.transition_model(z.detach(), batch.actions, noise), next_z)",
    ),
    "R̄'s z detached": ("agent.reward_model(z, batch.actions), b", "agent.reward_model(z.detach(), batch.actions), b"),
    "done loss left out": ("batch.rewards) + l_done", "batch.rewards)"),
    "done loss as cross-entropy": (
        'F.smooth_l1_loss(log_odds.sigmoid() + 1e-8, is_terminal, reduction="none")',
        'F.binary_cross_entropy_with_logits(log_odds, is_terminal, reduction="none")',
    ),
    "done of s for done of s'": ("agent.done_model(next_z), batch", "agent.done_model(z), batch"),
    "no straight-through": ("+ (p - p.detach())", "+ 0 * p"),
    "latent sampled, not its likeliest": ("NUM_CLASSES)))", "NUM_CLASSES)), gumbel(1, 32, 32))"),
    "mean over the classes too": ('reduction="none").sum(-1).mean(-1)', 'reduction="none").mean(-1).mean(-1)'),
    "sum over the variables": ('reduction="none").sum(-1).mean(-1)', 'reduction="none").sum(-1).sum(-1)'),
    "value loss into the encoder": ("self.critic(z.detach())", "self.critic(z)"),
    "losses beside the clip": (
        "compute_loss(agent, batch, z, penalty, args.clip_coef, args)",
        "compute_loss(agent, batch, z, 0.0, args.clip_coef, args); loss = loss + masked_mean(penalty, batch.mask)",
    ),
    "losses detached": ("batch.mask) - penalty  #", "batch.mask) - torch.as_tensor(penalty).detach()  #"),
    "normalised after subtracting": (
        "normalize(batch.advantages, batch.mask) - penalty",
        "normalize(batch.advantages - penalty, batch.mask)",
    ),
    "ratio not clipped": ("ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility", "ratio * utility"),
    "sample standard deviation": (
        "masked_mean(centred.square(), mask).sqrt()",
        "(centred.square().sum() / (len(mask) - 1)).sqrt()",
    ),
    "value loss not halved": ("value_loss = 0.5 *", "value_loss = 1.0 *"),
    "action before token": ("torch.cat((tokens, action), dim=-1)", "torch.cat((action, tokens), dim=-1)"),
    "tokens first, then one action": (
        "torch.cat((tokens, action), dim=-1).flatten(1)",
        "torch.cat((tokens.flatten(1), action.flatten(1)), dim=-1)",
    ),
    "one table for P̄ and R̄": ('embed(z, self.world_model["reward_tokens"])', 'embed(z, self.world_model["tokens"])'),
    "latent flattened C,H,W": (".permute(0, 2, 3, 1)  # (B, 7, 7, 64)", "  # (B, 64, 7, 7)"),
    "one norm for both parts": ("squares = [", "part = sum(parts.values(), []); squares = ["),
    "no clip of the gradient": ("(max_grad_norm / norm).clamp(max=1)", "(max_grad_norm / norm).clamp(1, 1)"),
    "gradient scaled up too": ("(max_grad_norm / norm).clamp(max=1)", "max_grad_norm / norm"),
    "Adam's eps": ("eps=1e-5", "eps=1e-8"),
    "one learning rate": ("(BEHAVIOUR, args.behaviour_learning_rate)", "(BEHAVIOUR, args.learning_rate)"),
    "a done stays": ("z = torch.where(is_done[-1][:, None, None], z, next_z)", "z = next_z"),
    "no cut at a done": (
        "compute_gae(rewards, values, is_done, is_done,",
        "compute_gae(rewards, values, 0 * is_done > 0, 0 * is_done > 0,",
    ),
    "done of z, not of z̄'": ("agent.done_model(next_z) + of_done", "agent.done_model(z) + of_done"),
    "likeliest done": ("agent.done_model(next_z) + of_done > 0", "agent.done_model(next_z) > 0"),
    "likeliest action": ("(log_probs + of_action).argmax(-1)", "log_probs.argmax(-1)"),
    "reward of the next latent": ("agent.reward_model(z, actions), lo", "agent.reward_model(next_z, actions), lo"),
    "moments forgotten": ("    optimizer.step()\n", "    optimizer.step()\n    optimizer.state.clear()\n"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_catches_dreamspi(mistake):
    assert first_difference("dreamspi_a6", altered(dream_spi_atari, *MISTAKES[mistake]))


def test_every_array_of_the_case_is_compared():
    with np.load(CASE) as file:
        stored = set(file)
    compared = {comparison.name for comparison in parity.check_case(CASE)}
    described = {"algorithm", "num_actions", "batch", "seed", "horizon", "names_model", "names_ac"}
    assert stored - compared == described and compared <= stored


@pytest.mark.parametrize("num_actions, rows, horizon", [(18, 16, 8), (9, 8, 4)])
def test_other_dreamspi_shapes_are_understood(num_actions, rows, horizon, tmp_path):
    """A case of other A, B, H and seed is read and compared; these stored numbers, being of A = 6, must not pass."""
    with np.load(CASE) as file:
        case = dict(file)
    case |= {"num_actions": np.array(num_actions), "batch": np.array(rows), "horizon": np.array(horizon)}
    case["seed"] = np.array(123)
    for name, value in case.items():
        if name.startswith(("imagined", "shared_imagined")):
            case[name] = value[:horizon, :rows]
        elif value.shape[:1] == (16,):
            case[name] = value[:rows]
    case["action_logits"] = np.zeros((rows, num_actions), dtype=np.float32)
    np.savez(tmp_path / "case.npz", **case)
    comparisons = {comparison.name: comparison for comparison in parity.check_case(tmp_path / "case.npz")}
    assert all(np.isfinite(comparison.error) for comparison in comparisons.values())
    for name in ("loss", "grad_norm", "synced_delta_norm", "imagined_values", "ac_loss", "shared_ac_loss"):
        assert not comparisons[name].passed, name


def test_a_malformed_dreamspi_case_is_told(tmp_path):
    with np.load(CASE) as file:
        case = dict(file)
    np.savez(tmp_path / "shape.npz", **case | {"old_logprob": np.zeros(3, dtype=np.float32)})
    del case["imagined_values"]
    np.savez(tmp_path / "lacking.npz", **case)
    for name in ("shape", "lacking"):
        with pytest.raises(parity.MalformedCase):
            parity.check_case(tmp_path / f"{name}.npz")
