"""PPO in the form of CleanRL's `ppo_atari_envpool.py`: python -m benchmark.peers.cleanrl_form --env-id Breakout-v5

A yardstick of speed, written anew after its published design (Huang et al., 2022, JMLR 23(274), and its documentation):
frames stored as float32, channels first, divided by 255 in every forward; a categorical distribution; advantages in a
loop over steps; minibatches of single shuffled steps; the value loss clipped. It has none of what the scripts have for
speed: bf16, channels last, chunks. It logs charts/SPS, and saves nothing.
"""

import time
from dataclasses import dataclass

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    env_id: str = "Breakout-v5"  # EnvPool id of the Atari game
    total_timesteps: int = 10_000_000  # agent steps in all
    num_envs: int = 128  # parallel environments (CleanRL: 8)
    num_steps: int = 8  # steps of each environment per iteration (CleanRL: 128)
    run_dir: str = "runs/cleanrl_form"  # folder of the TensorBoard events
    device: str = "cpu"  # where the network lives
    seed: int = 1  # seed of games and network


def init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Orthogonal weights of gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Actor and critic on one trunk."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.trunk = nn.Sequential(
            init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            init(nn.Linear(3136, 512)),
            nn.ReLU(),
        )
        self.actor = init(nn.Linear(512, num_actions), std=0.01)
        self.critic = init(nn.Linear(512, 1), std=1.0)

    def act(self, x: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions, their log-probabilities, entropy and value, (B,) each, of frames (B, 4, 84, 84)."""
        hidden = self.trunk(x / 255.0)
        policy = Categorical(logits=self.actor(hidden))
        actions = policy.sample() if actions is None else actions
        return actions, policy.log_prob(actions), policy.entropy(), self.critic(hidden).flatten()


def train(args: Args) -> None:
    """Train, and log the speed of every iteration."""
    T, N, device = args.num_steps, args.num_envs, args.device
    torch.manual_seed(args.seed)
    envs = envpool.make(
        args.env_id, env_type="gymnasium", num_envs=N, episodic_life=True, reward_clip=True, seed=args.seed
    )
    agent = Agent(envs.action_space.n).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    writer = SummaryWriter(args.run_dir)
    obs = torch.zeros((T, N, 4, 84, 84), device=device)
    actions, log_probs, rewards, dones, values = torch.zeros((5, T, N), device=device)
    next_obs, next_done = torch.Tensor(envs.reset()[0]).to(device), torch.zeros(N, device=device)
    num_iterations, start = args.total_timesteps // (T * N), time.time()
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * 2.5e-4
        for t in range(T):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                action, log_probs[t], _, values[t] = agent.act(next_obs)
            actions[t] = action
            frames, reward, terminated, truncated, _ = envs.step(action.cpu().numpy().astype(np.int32))
            rewards[t] = torch.tensor(reward).to(device)
            next_obs, next_done = torch.Tensor(frames).to(device), torch.Tensor(terminated | truncated).to(device)

        with torch.no_grad():
            next_value = agent.act(next_obs)[3]
            advantages, last = torch.zeros_like(rewards), 0
            for t in reversed(range(T)):
                going_on = 1.0 - (next_done if t == T - 1 else dones[t + 1])
                delta = rewards[t] + 0.99 * (next_value if t == T - 1 else values[t + 1]) * going_on - values[t]
                advantages[t] = last = delta + 0.99 * 0.95 * going_on * last
        flat = [x.flatten(0, 1) for x in (obs, actions, log_probs, advantages, advantages + values, values)]

        for _ in range(4):
            for rows in torch.randperm(T * N, device=device).chunk(4):
                b_obs, b_actions, b_log_probs, b_advantages, b_returns, b_values = (x[rows] for x in flat)
                _, new_log_probs, entropy, new_values = agent.act(b_obs, b_actions.long())
                ratio = (new_log_probs - b_log_probs).exp()
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                policy_loss = torch.max(-b_advantages * ratio, -b_advantages * ratio.clamp(0.9, 1.1)).mean()
                clipped = b_values + (new_values - b_values).clamp(-0.1, 0.1)
                errors = torch.max((new_values - b_returns).square(), (clipped - b_returns).square())
                loss = policy_loss - 0.01 * entropy.mean() + 0.5 * 0.5 * errors.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        step = (iteration + 1) * T * N
        writer.add_scalar("charts/SPS", step / (time.time() - start), step)
    writer.close()


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
