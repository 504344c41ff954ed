"""Parity with the published code's numbers, and proof that it would notice a difference."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import deep_spi_ppo_atari
import deepmdp_ppo_atari
from benchmark.peers import published_norm
from tests import parity

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*.npz"))


def test_there_are_cases():
    assert {path.stem for path in CASES} == {"deep_spi_a6", "deepmdp_a6", "deepmdp_penalty_a6", "dreamspi_a6", "gae"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_scripts_give_the_published_numbers(path):
    comparisons = parity.check_case(path)
    assert comparisons and not [comparison for comparison in comparisons if not comparison.passed]


def altered(script, old, new):
    """The script with one piece of its text replaced, as a module."""
    source = Path(script.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    module = types.ModuleType(f"altered_{script.__name__}")
    module.__file__ = script.__file__
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), script.__file__, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def first_difference(name, script=None):
    """The first quantity of a golden case that does not pass, or None. Nothing is computed after it."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        case = dict(file)
    check = parity.check_agent if "algorithm" in case else parity.check_gae
    return next((comparison.name for comparison in check(case, script) if not comparison.passed), None)


DEEP_SPI_MISTAKES = {
    "normalised after subtracting": (
        "utility = advantages - penalty",
        "utility = normalize(batch.advantages - penalty, batch.mask)",
    ),
    "z' detached": (
        "agent.transition_model(z, batch.actions, noise), next_z)  # (M,)",
        "agent.transition_model(z, batch.actions, noise), next_z.detach())  # (M,)",
    ),
    "z detached": ("reward_loss(agent.reward_model(z, ", "reward_loss(agent.reward_model(z.detach(), "),
    "mean over the latent": ('reduction="none").flatten(1).sum(-1)', 'reduction="none").flatten(1).mean(-1)'),
    "latent flattened C,H,W": ("self.fc(z.flatten(1))", "self.fc(z.permute(0, 3, 1, 2).flatten(1))"),
    "sample standard deviation": (
        "masked_mean(centred.square(), mask).sqrt()",
        "(centred.square().sum() / (len(mask) - 1)).sqrt()",
    ),
    "losses outside the min": ('if args.loss_placement == "additive":', "if True:"),
    "losses stopped beside the clip": ('if args.loss_placement == "gated":', "if True:"),
    "coefficients exchanged": (
        "args.reward_loss_coef * l_r + args.transition_loss_coef * l_p",
        "args.transition_loss_coef * l_r + args.reward_loss_coef * l_p",
    ),
    "z' is z": ("z[:, 1:].flatten(0, 1)", "z[:, :-1].flatten(0, 1)"),
    "rows in another order": (
        "return z[:, :length].flatten(0, 1)",
        "return z[:, :length].flip(0).flatten(0, 1)",
    ),
    "padded at the top": ("F.pad(z, (0, 0, 0, 1, 0, 1))", "F.pad(z, (0, 0, 0, 1, 1, 0))"),
    "padded at the left": ("F.pad(z, (0, 0, 0, 1, 0, 1))", "F.pad(z, (0, 0, 1, 0, 0, 1))"),
    "patches padded at the left": ("h * w, 1, h, w), (0, 1, 0, 1))", "h * w, 1, h, w), (1, 0, 0, 1))"),
    "patches padded at the top": ("h * w, 1, h, w), (0, 1, 0, 1))", "h * w, 1, h, w), (0, 1, 1, 0))"),
    "nothing halved": ("weights = 0.5 * logits", "weights = 1.0 * logits"),
    "loc not halved": ("return (loc + weights", "return (2 * loc + weights"),
    "loc and scale exchanged": ("of_x, of_y = p.view", "of_y, of_x = p.view"),
    "channels of loc in the wrong order": ("of_x.permute(2, 3, 0, 1, 4)", "of_x.flip(1).permute(2, 3, 0, 1, 4)"),
    "channels of scale in the wrong order": ("of_y.permute(3, 0, 2, 1, 4)", "of_y.flip(1).permute(3, 0, 2, 1, 4)"),
    "mixture reads C,H,W": (".mT.flatten(1)  # in hidden's order", ".flatten(1)  # in hidden's order"),
    "loc not weighted": ("mixed = (weights[:, :, None]", "mixed = (torch.full_like(weights, 0.1)[:, :, None]"),
    "noise not weighted": ("weights.to(y.dtype)", "torch.full_like(weights, 0.1)"),
    "softplus left out": ("F.softplus(y) * noise", "y * noise"),
    "pixels not scaled": ("first.weight / 255", "first.weight"),
    "pairs sorted the other way": (
        "(first - swap, second + swap)",
        "(second + swap, first - swap)",
    ),
    "value loss not halved": ("value_loss = 0.5 *", "value_loss = 1.0 *"),
    "ratio not clipped": ("ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility", "ratio * utility"),
}
DEEPMDP_MISTAKES = {
    "sum over the latent": ('reduction="none").flatten(1).mean(-1)', 'reduction="none").flatten(1).sum(-1)'),
    "z' detached": ("transition_loss(predicted_next_z, next_z)", "transition_loss(predicted_next_z, next_z.detach())"),
    "no ReLU on the prediction": (
        "F.relu(torch.baddbmm(biases, kernels, patches))",
        "torch.baddbmm(biases, kernels, patches)",
    ),
    "penalty on norms, not squares": ("gradient.square().sum(-1) + 1e-8", "gradient.norm(dim=-1)"),
    "penalty on R̄ only": ("in (predicted_next_z, predicted_rewards):", "in (predicted_rewards,):"),
    "penalty without its own gradient": ("create_graph=True)[0].flatten(1)", "retain_graph=True)[0].flatten(1)"),
    "actions in the wrong order": ("view(C, self.A, -1).transpose(0, 1)", "view(self.A, C, -1)"),
}


PUBLISHED_NORM_MISTAKES = {
    "sigma instead of the published rule": (
        "published_spectral_norm(matrix, self.power_start)",
        "torch.linalg.matrix_norm(matrix, 2)",
    ),
    "power iteration not differentiated": ("    v = v[:, None]\n", "    v, matrix = v[:, None], matrix.detach()\n"),
    "last vector normalised": ("return (u * (matrix @ v))", "return (u * (matrix @ v) / v.norm(dim=-2, keepdim=True))"),
}


@pytest.mark.parametrize("mistake", DEEP_SPI_MISTAKES)
def test_parity_catches_deep_spi(mistake):
    assert first_difference("deep_spi_a6", altered(deep_spi_ppo_atari, *DEEP_SPI_MISTAKES[mistake]))


@pytest.mark.parametrize("mistake", PUBLISHED_NORM_MISTAKES)
def test_parity_catches_the_published_norm(mistake, monkeypatch):
    monkeypatch.setattr(parity, "published_norm", altered(published_norm, *PUBLISHED_NORM_MISTAKES[mistake]))
    assert first_difference("deep_spi_a6")


@pytest.mark.parametrize("mistake", DEEPMDP_MISTAKES)
def test_parity_catches_deepmdp(mistake):
    assert first_difference("deepmdp_penalty_a6", altered(deepmdp_ppo_atari, *DEEPMDP_MISTAKES[mistake]))


@pytest.mark.parametrize(
    "mistake", [("~is_last[t + 1] * advantage", "advantage"), ("values[1:] * ~is_terminal[1:]", "values[1:]")]
)
def test_parity_catches_gae(mistake):
    assert first_difference("gae", altered(deep_spi_ppo_atari, *mistake))


@pytest.mark.parametrize("name, num_actions", [("deep_spi_a6", 18), ("deep_spi_a6", 3), ("deepmdp_penalty_a6", 9)])
def test_other_shapes_and_seeds_are_understood(name, num_actions):
    """A case of other A, B and seed is read and compared; these stored numbers, being cut from A = 6, must not pass."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        case = dict(file)
    rows = 5
    case |= {"num_actions": np.array(num_actions), "batch": np.array(rows), "seed": np.array(123)}
    random = np.random.RandomState(0)
    for key, value in case.items():
        if value.shape[:1] == (8,):
            case[key] = value[:rows]
    case["logits"] = random.standard_normal((rows, num_actions)).astype(np.float32)
    for width in (num_actions, 5 * num_actions):
        case[f"power_start/{width}"] = random.standard_normal(width).astype(np.float32)
    comparisons = {comparison.name: comparison for comparison in parity.check_agent(case)}
    with np.load(GOLDEN / f"{name}.npz") as file:
        stored = {key for key in file if key.startswith(("grad_", "five_step_delta"))}
    assert stored <= comparisons.keys() | {"gradient_penalty_coef"}
    assert all(np.isfinite(comparison.error) for comparison in comparisons.values())
    assert not comparisons["loss"].passed and not comparisons["logits"].passed


def test_command_line_reports_each_quantity():
    command = [sys.executable, "-m", "tests.parity", GOLDEN / "deep_spi_a6.npz", GOLDEN / "gae.npz"]
    done = subprocess.run(command, cwd=GOLDEN.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.endswith("pass")]) == len(lines) - 1 > 80


def test_command_line_exit_codes(tmp_path, capsys):
    with np.load(GOLDEN / "gae.npz") as file:
        wrong = dict(file)
    wrong["advantages"] = wrong["advantages"] + 1e-2
    np.savez(tmp_path / "wrong.npz", **wrong)
    del wrong["rewards"]
    np.savez(tmp_path / "lacking.npz", **wrong)
    np.savez(tmp_path / "unknown.npz", something=np.zeros(3))
    with np.load(GOLDEN / "deepmdp_a6.npz") as file:
        np.savez(tmp_path / "algorithm.npz", **dict(file) | {"algorithm": "dreamer"})
        np.savez(tmp_path / "shape.npz", **dict(file) | {"old_logprob": np.zeros(3, dtype=np.float32)})
        np.savez(tmp_path / "scalar.npz", **dict(file) | {"old_logprob": np.float32(1)})
    with np.load(GOLDEN / "gae.npz") as file:
        np.savez(tmp_path / "values.npz", **dict(file) | {"values": np.zeros((3, 4), dtype=np.float32)})
    (tmp_path / "text.npz").write_text("not a case")
    with open(tmp_path / "array.npz", "wb") as array:  # one array, in numpy's other format
        np.save(array, np.zeros(3))
    malformed = ("lacking", "unknown", "algorithm", "shape", "scalar", "values", "text", "array", "missing")
    for name, code in {"wrong": 1, **dict.fromkeys(malformed, 2)}.items():
        with pytest.raises(SystemExit) as ended:
            parity.main([str(tmp_path / f"{name}.npz")])
        assert ended.value.code == code, name
        assert len(capsys.readouterr().err.splitlines()) == (code == 2), name
