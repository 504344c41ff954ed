"""DreamSPI's part of `python -m tests.parity`: a case with `algorithm` "dreamspi". Format: `tests/golden/README.md`.

What the published code does otherwise than the script is done here, by what the script is given or by a patch of it:
dummies in every loss with z' <- z (masks of 1, and s for s'), gradients at weights of the iteration's beginning
(`StaleLoss`), and a critic that reads the actor's hidden layer (`share_layer`).
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dream_spi_atari
from benchmark.peers.dream_spi_published import StaleLoss
from tests.parity import Comparison, from_hwio, hwio, relative_error

TOLERANCE, DELTA_TOLERANCE = 2e-5, 3e-4
MODULES = {  # published name: the script's
    "actor/Dense_0": "actor.2",
    "actor_fc/Dense_0": "actor.0",
    "conv/Conv_0": "encoder.0",
    "conv/Conv_1": "encoder.2",
    "conv/Conv_2": "encoder.4",
    "critic/Dense_0": "critic.2",
    "critic_fc/Dense_0": "critic.0",
    "done/Dense_0": "world_model.done.0",
    "done/Dense_1": "world_model.done.2",
    "latent/Dense_0": "latent.0",
    "reward/Dense_0": "world_model.reward.0",
    "reward/Dense_1": "world_model.reward.2",
    "transition/Dense_0": "world_model.transition.0",
    "transition/Dense_1": "world_model.transition.2",
}
TABLES = {  # without `/kernel` and `/bias`, and not transposed
    "reward/embedding": "world_model.reward_tokens",
    "transition/Embed_0/embedding": "world_model.actions",
    "transition/embedding": "world_model.tokens",
}


class Inputs(NamedTuple):
    """What a case's seed draws, beside the parameters."""

    obs: Tensor  # (B, 84, 84, 4)
    next_obs: Tensor
    actions: Tensor
    rewards: Tensor
    dones: Tensor
    next_dones: Tensor
    advantages: Tensor
    returns: Tensor
    gumbel: Tensor
    permutations: np.ndarray
    step_gumbel: Tensor
    action_gumbel: Tensor
    latent_gumbel: Tensor
    done_logistic: Tensor
    ac_noise: Tensor
    ac_permutation: Tensor


def to_case_layout(name: str, parameter: Tensor) -> np.ndarray:
    """A parameter or gradient of ours as the case has it."""
    return (parameter if name.endswith("embedding") else hwio(parameter)).detach().double().numpy()


def named_parameters(agent: nn.Module) -> dict[str, nn.Parameter]:
    """The agent's parameters under their published names, in sorted order."""
    parameters = {name: agent.get_submodule(ours).weight for name, ours in TABLES.items()}
    for name, ours in MODULES.items():
        module = agent.get_submodule(ours)
        parameters[f"{name}/bias"], parameters[f"{name}/kernel"] = module.bias, module.weight
    assert len(parameters) == len(list(agent.parameters())), "a parameter of the script has no published name"
    return dict(sorted(parameters.items()))


def float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def draw(case: dict[str, np.ndarray], agent: nn.Module) -> Inputs:
    """Fill the agent with the case's parameters, and draw its inputs, in the order of the golden README."""
    random = np.random.RandomState(int(case["seed"]))
    num_actions, rows, horizon = (int(case[name]) for name in ("num_actions", "batch", "horizon"))
    with torch.no_grad():
        for name, parameter in named_parameters(agent).items():
            shape = to_case_layout(name, parameter).shape
            drawn = random.standard_normal(shape)
            if name.endswith("bias"):
                drawn = 0.05 * drawn
            elif not name.endswith("embedding"):
                drawn = drawn * math.sqrt(1 / math.prod(shape[:-1]))
            drawn = drawn.astype(np.float32)
            parameter.copy_(torch.from_numpy(drawn) if name.endswith("embedding") else from_hwio(drawn))

    def frames() -> Tensor:
        blocks = random.randint(0, 256, (rows, 4, 12, 12)).astype(np.uint8)
        return torch.from_numpy(blocks.repeat(7, axis=2).repeat(7, axis=3)).permute(0, 2, 3, 1).contiguous()

    def gumbel(*shape: int) -> Tensor:
        return float32(-np.log(-np.log(random.random_sample(shape))))

    obs, next_obs = frames(), frames()
    actions = torch.from_numpy(random.randint(0, num_actions, rows))
    rewards = float32(random.randint(-1, 2, rows))
    dones, next_dones = torch.from_numpy(random.rand(rows) < 0.2), torch.from_numpy(random.rand(rows) < 0.3)
    advantages, returns = float32(random.standard_normal(rows)), float32(random.standard_normal(rows))
    random.standard_normal(rows)  # the noise of old_logprob, which is stored
    noise = gumbel(rows, 32, 32)
    permutations = np.stack([random.permutation(rows) for _ in range(4)])
    step_noise = gumbel(8, rows // 2, 32, 32)
    action_noise, latent_noise = gumbel(horizon, rows, num_actions), gumbel(horizon, rows, 32, 32)
    uniform = 0.6 * random.random_sample((horizon, rows))
    ac_noise = float32(0.15 * random.standard_normal((horizon, rows)))
    return Inputs(
        obs, next_obs, actions, rewards, dones, next_dones, advantages, returns, noise, permutations, step_noise,
        action_noise, latent_noise, float32(np.log(uniform) - np.log1p(-uniform)), ac_noise,
        torch.from_numpy(random.permutation(horizon * rows)),
    )  # fmt: skip


def share_layer(agent: nn.Module) -> nn.Module:
    """The published agent without `decoupled_repr`: the critic's head reads the actor's hidden layer, and trains it.

    Then the value loss reaches z too. The hidden layer belongs to the actor's part, the head is the critic's.
    """
    agent = copy.deepcopy(agent)
    parts = agent.parts()

    def policy_and_value(z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = agent.actor[1](agent.actor[0](z.flatten(1)))
        return agent.actor[2](hidden).log_softmax(-1), agent.critic[2](hidden).squeeze(-1)

    parts["critic"] = list(agent.critic[2].parameters())
    agent.policy_and_value, agent.parts = policy_and_value, lambda: parts
    return agent


class Check:
    """The comparisons of one case."""

    def __init__(self, case: dict[str, np.ndarray], script: ModuleType):
        self.case, self.script = case, script
        self.agent = script.Agent(int(case["num_actions"]))
        self.inputs = draw(case, self.agent)
        self.names_model, self.names_ac = (list(map(str, case[f"names_{part}"])) for part in ("model", "ac"))
        random = np.random.RandomState(int(case["seed"]) + 7919)
        parameters = named_parameters(self.agent)
        self.projections = {n: random.standard_normal(to_case_layout(n, p).shape) for n, p in parameters.items()}
        x = self.inputs
        next_obs = torch.where(x.dones[:, None, None, None], x.obs, x.next_obs)  # z' <- z
        old_log_probs = self.full_log_probs(self.agent.encode(x.obs), x.actions, float32(case["old_logprob"]))
        self.real = script.Transitions(
            obs=torch.stack((x.obs, next_obs), dim=1),  # chunks of one step
            actions=x.actions,
            rewards=x.rewards,
            old_log_probs=old_log_probs,
            advantages=x.advantages,
            returns=x.returns,
            next_is_terminal=x.next_dones.float(),
            mask=torch.ones(len(x.obs)),
        )

    def full_log_probs(self, z: Tensor, actions: Tensor, taken: Tensor) -> Tensor:
        """A case knows only the taken actions' old probabilities; the losses use no other. Shape (M, A)."""
        with torch.no_grad():
            return self.agent.policy_and_value(z)[0].scatter(1, actions[:, None], taken[:, None])

    def args(self, **settings):
        """The script's defaults, but for these."""
        return self.script.Args(**settings)

    def model_loss_of(self, batch, noise: Tensor, agent: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """As `train` has it for φ and the world model."""
        return self.script.model_loss(agent, batch, noise, self.args())

    def behaviour_loss_of(self, batch, agent: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """As `train` has it for actor and critic."""
        args = self.args()
        return self.script.compute_loss(agent, batch, batch.obs, 0.0, args.imagination_clip_coef, args)

    def compare(self, name: str, ours: Tensor | np.ndarray | float, norms: str = "") -> Comparison:
        """One stored quantity. `norms`: the array of norms that its error is relative to, entry by entry."""
        stored = self.case[name]
        ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
        if ours.shape != stored.shape:
            error = math.inf
        elif norms:
            error = float((np.abs(ours - stored) / self.case[norms]).max())
        elif stored.dtype.kind in "iu":
            error = float((ours.astype(np.int64) != stored).sum())
        elif name.endswith("metrics") or stored.ndim == 0:
            error = float(np.abs(ours - stored).max())
        else:
            error = relative_error(ours, stored)
        exact = stored.dtype == np.uint8
        return Comparison(name, error, 0.0 if exact else DELTA_TOLERANCE if "delta_" in name else TOLERANCE)

    def gradients(self, prefix: str, agent: nn.Module, names: list[str]) -> Iterator[Comparison]:
        """`grad_norm`, `grad_proj` and, where stored, the six largest entries of each parameter's gradient."""
        parameters = named_parameters(agent)
        missing = {name for name in names if parameters[name].grad is None}
        if missing:
            yield Comparison(f"{prefix}grad_norm", math.inf, TOLERANCE)
            return
        gradients = {name: to_case_layout(name, parameters[name].grad) for name in names}
        norms = np.array([np.linalg.norm(gradient) for gradient in gradients.values()])
        projections = np.array([(gradient * self.projections[name]).sum() for name, gradient in gradients.items()])
        yield self.compare(f"{prefix}grad_norm", norms, norms=f"{prefix}grad_norm")
        yield self.compare(f"{prefix}grad_proj", projections, norms=f"{prefix}grad_norm")
        if f"{prefix}grad_top" in self.case:
            index = self.case[f"{prefix}grad_top_index"]
            ours, excess = np.zeros(index.shape), 0.0
            for k, gradient in enumerate(gradients.values()):
                flat, known = gradient.ravel(), index[k] < gradient.size
                ours[k] = np.where(known, flat[np.where(known, index[k], 0)], math.inf)
                # Of ours too they are the largest: no other is larger than the smallest of them, but by rounding.
                rest = np.delete(np.abs(flat), index[k][known])
                excess = max(excess, rest.max(initial=0.0) / max(np.abs(ours[k]).min(), 1e-30) - 1)
            yield self.compare(f"{prefix}grad_top", ours)
            yield Comparison(f"{prefix}grad_top_index", excess, TOLERANCE)

    def deltas(self, prefix: str, before: dict[str, np.ndarray], agent: nn.Module, names) -> Iterator[Comparison]:
        """How far the parameters moved, `before` being the old ones."""
        parameters = named_parameters(agent)
        moved = {name: to_case_layout(name, parameters[name]) - before[name] for name in names}
        norms = np.array([np.linalg.norm(delta) for delta in moved.values()])
        projections = np.array([(delta * self.projections[name]).sum() for name, delta in moved.items()])
        yield self.compare(f"{prefix}delta_norm", norms, norms=f"{prefix}delta_norm")
        yield self.compare(f"{prefix}delta_proj", projections, norms=f"{prefix}delta_norm")

    # ---- The parts of a case, as golden/README.md numbers them

    def forward_values(self) -> Iterator[Comparison]:
        """Part 1, row by row."""
        agent, script, x, real = self.agent, self.script, self.inputs, self.real
        outputs = {}
        layers = {"latent": agent.latent, "next": agent.world_model["transition"], "actor": agent.actor}
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
            for name, layer in layers.items()
        ]
        args = self.args()
        with torch.no_grad():
            z = agent.encode(x.obs)
            logits = outputs["latent"].view(-1, 32, 32)
            yield self.compare("latent_logits_row0", logits[0])
            yield self.compare("latent_logits_lse", logits.logsumexp(-1))
            yield self.compare("latent_index", z.argmax(-1))
            yield self.compare("next_latent_index", agent.encode(x.next_obs).argmax(-1))
            predicted = agent.transition_model(z, x.actions, x.gumbel)
            next_logits = outputs["next"].view(-1, 32, 32)
            yield self.compare("transition_logits_row0", next_logits[0])
            yield self.compare("transition_logits_lse", next_logits.logsumexp(-1))
            yield self.compare("sampled_index", predicted.argmax(-1))
            reward_pred = agent.reward_model(z, x.actions)
            next_z = agent.encode(real.obs[:, 1])
            done_logits = agent.done_model(next_z)
            l_done = script.done_loss(done_logits, real.next_is_terminal)
            l_r = script.reward_loss(reward_pred, x.rewards) + l_done
            l_p = script.transition_loss(predicted, next_z)
            yield self.compare("reward_pred", reward_pred)
            yield self.compare("done_logits", done_logits)
            yield self.compare("done_loss_per_sample", l_done)
            yield self.compare("reward_loss_per_sample", l_r)
            yield self.compare("transition_loss_per_sample", l_p)
            log_probs, values = agent.policy_and_value(z)
            yield self.compare("action_logits", outputs["actor"])
            yield self.compare("value", values)
            yield self.compare("new_logprob", log_probs.gather(1, x.actions[:, None]).squeeze(1))
            yield self.compare("old_logprob", real.old_log_probs.gather(1, x.actions[:, None]).squeeze(1))
            yield self.compare("entropy_per_sample", -(log_probs.exp() * log_probs).sum(-1))
            penalty = args.reward_loss_coef * l_r + args.transition_loss_coef * l_p
            yield self.compare("utility", script.normalize(real.advantages, real.mask) - penalty)
        for hook in hooks:
            hook.remove()

    def model_loss(self, agent: nn.Module, prefix: str = "") -> Iterator[Comparison]:
        """Part 1: the loss and its gradients."""
        agent.zero_grad()
        loss, stats = self.script.model_loss(agent, self.real, self.inputs.gumbel, self.args())
        parts = agent.parts()
        loss.backward(inputs=[parameter for name in self.script.MODEL for parameter in parts[name]])
        yield self.compare(f"{prefix}loss", loss)
        scalars = {
            "pg_loss": "losses/policy_loss",
            "v_loss": "losses/value_loss",
            "entropy": "losses/entropy",
            "approx_kl": "losses/approx_kl",
            "reward_loss": "world_model/reward_loss",
            "transition_loss": "world_model/transition_loss",
        }
        for name, ours in scalars.items():
            yield self.compare(f"{prefix}{name}", stats[ours])
        if prefix:  # what the case has of `value` in part 1
            with torch.no_grad():
                yield self.compare(f"{prefix}value", agent.policy_and_value(agent.encode(self.inputs.obs))[1])
        yield from self.gradients(prefix, agent, self.names_model)

    def model_steps(self, gradients: str) -> Iterator[Comparison]:
        """Part 2: two iterations of 2 epochs x 2 minibatches. `gradients`: synced or published."""
        agent, args = copy.deepcopy(self.agent), self.args()
        optimizer, batches = self.script.make_optimizer(agent, args), self.inputs.permutations.reshape(4, 2, -1)
        before = {name: to_case_layout(name, p).copy() for name, p in named_parameters(agent).items()}
        metrics, noise = [], iter(self.inputs.step_gumbel)
        names = ("losses/policy_loss", "losses/entropy", "losses/approx_kl")
        names += ("world_model/transition_loss", "world_model/reward_loss")
        for iteration in range(2):
            stale = copy.deepcopy(agent)
            for group in optimizer.param_groups:
                group["lr"] = (1 - iteration / 10) * group["first_lr"]
            for epoch in batches[2 * iteration : 2 * iteration + 2]:
                rows = []
                for minibatch in epoch:
                    batch = self.script.Transitions(*(x[minibatch] for x in self.real))
                    of_agent = partial(self.model_loss_of, batch, next(noise))
                    if gradients == "published":
                        loss = StaleLoss(agent, stale, "encoder", of_agent)
                        stats = loss.stats
                    else:
                        loss, stats = of_agent(agent)
                    self.script.optimizer_step(optimizer, loss, self.script.MODEL, 0.05)
                    rows.append([stats[name].item() for name in names])
                metrics.append(np.mean(rows, axis=0))
        yield self.compare(f"{gradients}_step_metrics", np.stack(metrics))
        yield from self.deltas(f"{gradients}_", before, agent, self.names_model)

    def imagination(self, agent: nn.Module, prefix: str = "") -> Iterator[Comparison]:
        """Part 3; leaves what was imagined in `self.imagined`."""
        x = self.inputs
        with torch.no_grad():
            z = agent.encode(x.obs)
            ones = torch.ones(len(z))
            noise = x.action_gumbel, x.latent_gumbel, x.done_logistic
            self.imagined = imagined = self.script.imagine(agent, z, ones, *noise, self.args())
        values = imagined.returns - imagined.advantages
        if not prefix:
            taken = imagined.old_log_probs.gather(2, imagined.actions[:, :, None]).squeeze(2)
            ends = imagined.next_is_terminal
            # The latent after the last step is the one thing that `imagine` does not hand out.
            last = agent.transition_model(imagined.obs[-1], imagined.actions[-1], x.latent_gumbel[-1])
            last = torch.where(ends[-1, :, None, None] > 0, imagined.obs[-1], last)
            index = torch.cat((imagined.obs[1:], last[None])).argmax(-1)
            yield self.compare("imagined_actions", imagined.actions)
            yield self.compare("imagined_next_index", index)
            yield self.compare("imagined_rewards", imagined.rewards)
            yield self.compare("imagined_next_dones", ends)
            yield self.compare("imagined_dones", torch.cat((x.dones[None].float(), ends[:-1])))
            yield self.compare("imagined_logprobs", taken)
        yield self.compare(f"{prefix}imagined_values", values)
        yield self.compare(f"{prefix}imagined_advantages", imagined.advantages)
        yield self.compare(f"{prefix}imagined_returns", imagined.returns)

    def behaviour_loss(self, agent: nn.Module, prefix: str, names: list[str]) -> Iterator[Comparison]:
        """Part 4: the loss on all imagined rows, and its gradients."""
        flat = self.script.Transitions(*(x.flatten(0, 1) for x in self.imagined))
        noise = self.inputs.ac_noise.flatten()
        taken = flat.old_log_probs.gather(1, flat.actions[:, None]).squeeze(1) + noise
        batch = flat._replace(old_log_probs=flat.old_log_probs.scatter(1, flat.actions[:, None], taken[:, None]))
        agent.zero_grad()
        loss, stats = self.behaviour_loss_of(batch, agent)
        parts = agent.parts()
        loss.backward(inputs=[parameter for name in self.script.BEHAVIOUR for parameter in parts[name]])
        yield self.compare(f"{prefix}ac_loss", loss)
        scalars = {"pg_loss": "policy_loss", "v_loss": "value_loss", "entropy": "entropy", "approx_kl": "approx_kl"}
        for name, ours in scalars.items():
            yield self.compare(f"{prefix}ac_{name}", stats[f"losses/{ours}"])
        yield from self.gradients(f"{prefix}ac_", agent, names)

    def behaviour_steps(self, start: nn.Module, prefix: str, gradients: str, names: list[str]) -> Iterator[Comparison]:
        """Part 5: one epoch of sixteen minibatches."""
        shared = bool(prefix)
        agent, args = share_layer(start) if shared else copy.deepcopy(start), self.args()
        stale = share_layer(start) if shared else copy.deepcopy(start)
        optimizer = self.script.make_optimizer(agent, args)
        before = {name: to_case_layout(name, p).copy() for name, p in named_parameters(agent).items()}
        flat, rows = self.script.Transitions(*(x.flatten(0, 1) for x in self.imagined)), []
        for minibatch in self.inputs.ac_permutation.view(16, -1):
            batch = self.script.Transitions(*(x[minibatch] for x in flat))
            of_agent = partial(self.behaviour_loss_of, batch)
            if gradients == "published":
                loss = StaleLoss(agent, stale, "actor", of_agent)
                stats = loss.stats
            else:
                loss, stats = of_agent(agent)
            self.script.optimizer_step(optimizer, loss, self.script.BEHAVIOUR, args.max_grad_norm)
            names_of = ("policy_loss", "value_loss", "entropy", "approx_kl")
            rows.append([stats[f"losses/{name}"].item() for name in names_of])
        yield self.compare(f"{prefix}ac_{gradients}_metrics", np.mean(rows, axis=0))
        yield from self.deltas(f"{prefix}ac_{gradients}_", before, agent, names)


def check_dreamspi(case: dict[str, np.ndarray], script: ModuleType | None = None) -> Iterator[Comparison]:
    """Compare the script's agent with a case's numbers. `script` may be given to test an altered one."""
    check = Check(case, script or dream_spi_atari)
    yield from check.forward_values()
    yield from check.model_loss(check.agent)
    for gradients in ("synced", "published"):
        yield from check.model_steps(gradients)
    for prefix in ("", "shared_"):
        agent = share_layer(check.agent) if prefix else check.agent
        names = [name for name in check.names_ac if not prefix or not name.startswith("critic_fc")]
        if prefix:
            yield from check.model_loss(agent, prefix)
        yield from check.imagination(agent, prefix)
        yield from check.behaviour_loss(agent, prefix, names)
        for gradients in ("synced", "published"):
            yield from check.behaviour_steps(check.agent, prefix, gradients, names)
