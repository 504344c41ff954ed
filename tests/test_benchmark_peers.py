"""The published spectral norm as a patch: the divisor, which layers have it, and a run that is made with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import deep_spi_ppo
import deep_spi_ppo_atari
import evaluate
from benchmark.peers import deep_spi_published_norm
from benchmark.peers.published_norm import patch

SIZES = {deep_spi_ppo: (4, 2), deep_spi_ppo_atari: (6,)}  # of an agent


def divisor(matrix: np.ndarray, start: np.ndarray) -> float:
    """The published rule, step by step: two of power iteration; the last v is not brought to length 1."""
    v = start
    for _ in range(2):
        v = v / np.sqrt((v**2).sum() + 1e-8)
        u = matrix @ v
        u = u / np.sqrt((u**2).sum() + 1e-8)
        v = matrix.T @ u
    return u @ matrix @ v


@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.__name__)
def test_weights_are_divided_as_published(script):
    with patch(script):
        agent = script.Agent(*SIZES[script])
    layers = [layer for layer in agent.modules() if isinstance(layer, script.SpectralLayer)]
    assert len(layers) >= 6
    for layer in layers:
        before = layer.weight.detach().double().numpy()
        after = layer.normalized_weight().detach().numpy()
        groups = np.split(before.reshape(len(before), -1), layer.groups)
        if before.ndim == 2:  # there a linear layer's matrix is (in, out)
            groups = [group.T for group in groups]
        start = torch.randn(groups[0].shape[1], generator=torch.Generator().manual_seed(0)).double().numpy()
        expected = [
            own / divisor(group, start) for own, group in zip(np.split(before, layer.groups), groups, strict=True)
        ]
        np.testing.assert_allclose(after, np.concatenate(expected), rtol=1e-4, atol=1e-6)


def test_the_patch_ends_and_changes_neither_weights_nor_draws():
    layer = deep_spi_ppo.SpectralLayer
    torch.manual_seed(0)
    plain = deep_spi_ppo.Agent(4, 2)
    torch.manual_seed(0)
    with patch(deep_spi_ppo):
        patched = deep_spi_ppo.Agent(4, 2)
        assert deep_spi_ppo.SpectralLayer is not layer
    assert deep_spi_ppo.SpectralLayer is layer
    assert plain.state_dict().keys() == patched.state_dict().keys()
    assert all(torch.equal(value, patched.state_dict()[name]) for name, value in plain.state_dict().items())
    z, actions = torch.ones(1, 32), torch.zeros(1, dtype=torch.int64)
    assert plain.reward_model(z, actions) != patched.reward_model(z, actions)


def test_a_run_names_what_it_is_and_can_be_evaluated(tmp_path: Path):
    shape = {"num_envs": 4, "num_steps": 8, "total_timesteps": 64, "num_minibatches": 2}
    args = deep_spi_published_norm.Args(run_dir=str(tmp_path / "run"), device="cpu", precision="fp32", **shape)
    deep_spi_published_norm.train(args)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["script"] == "deep_spi_published_norm.py" and (tmp_path / "run" / config["script"]).exists()
    script = evaluate.script_of(tmp_path / "run", config, None)
    agent = evaluate.make_agent(script, args, script.Games(args), evaluate.load_weights(tmp_path / "run"))
    assert hasattr(agent.reward_model.output, "power_start")
    evaluate.main(evaluate.Args(tmp_path / "run", episodes=2, policy="sampled", max_length=20))
    assert (tmp_path / "run" / "evaluation.csv").read_text().count("sampled,") == 2
