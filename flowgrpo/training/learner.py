"""From experience and advantages to new weights: loss, gradients, optimizer, moving average."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.config import Config, Train
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Gaussian
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.losses.losses import ClippedLoss, NFTLoss, guard_weight, velocity_kl
from flowgrpo.policy import EMA, PipelinePolicy
from flowgrpo.policy.arguments import call_key
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.policy.weights import swapped
from flowgrpo.training.metrics import Statistics

GRADIENT_NORMS_KEPT = 50
MIN_NORMS_FOR_SPIKE = 10


class Learner:
    """Owns the optimizer and what else changes with an update.

    Attributes:
        num_updates: Optimizer steps taken or skipped so far.
        ema: The moving average of the weights, if there is one.
        sampler: The weights that sample, where they trail behind the trained ones (DiffusionNFT).
    """

    def __init__(self, policy: PipelinePolicy, config: Config, accelerator: Accelerator):
        assert policy.trainable is not None
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.named = policy.trainable.parameters
        self.parameters = list(self.named.values())
        t = config.train
        self.adam = _adamw(self.parameters, t)
        self.optimizer = accelerator.prepare(self.adam)
        self.ema = EMA(self.parameters, t.ema_decay) if t.ema_decay > 0 else None
        trails = isinstance(config.loss, NFTLoss)
        self.sampler = [p.detach().clone() for p in self.parameters] if trails else None
        # In the first update of an iteration the policy that acted is the policy itself.
        needs_means = isinstance(config.loss, ClippedLoss) and config.loss.needs_old_mean
        policy.keeps_means = needs_means and t.updates > 1
        self.num_updates = 0
        self.gradient_norms: list[float] = []

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that sample."""
        return nullcontext() if self.sampler is None else swapped(self.parameters, self.sampler)

    def update(
        self, experience: Experience, advantages: Float[Tensor, " actions"], random: Random
    ) -> dict[str, float]:
        """All optimizer steps of one iteration. Returns the metrics of the iteration.

        Each step trains on a share of the groups. Its loss is the mean over all their actions on
        all ranks. Actions without advantage are counted in the mean but not computed, unless a KL
        is wanted: they would not change the gradient.
        """
        statistics = Statistics(isinstance(self.config.loss, ClippedLoss))
        updates = self.config.train.updates
        order = torch.randperm(self.config.train.groups, generator=random.generator("updates"))
        for update in range(updates):
            chosen = torch.isin(experience.actions.group, order[update::updates])
            number = self.accelerator.reduce(chosen.sum().to(self.policy.device), "sum").item()
            with_kl = self.config.loss.kl_coef > 0
            trained = chosen if with_kl else chosen & (advantages != 0)
            batches = list(self._batches(experience, advantages, trained))
            anchors = self._anchors(experience, [a for a, _ in batches] if with_kl else [])
            for (actions, advantage), anchor in zip_longest(batches, anchors):
                loss = self._loss(
                    experience, actions, advantage, anchor, statistics, first=update == 0
                )
                # A step whose denoiser is not trained (Wan 2.2 has two) has nothing to give.
                if loss.requires_grad:
                    self.accelerator.backward(loss / number)
            self._step(statistics)
        self._follow()
        return statistics.summary(self.accelerator) | self._drift(experience)

    def _batches(
        self, experience: Experience, advantages: Tensor, trained: Tensor
    ) -> Iterator[tuple[Actions, Tensor]]:
        """Actions of one step each, on at most ``train_batch`` states: what one forward serves."""
        actions = experience.actions
        keys: dict[Hashable, list[int]] = {}
        for group in experience.groups:
            keys.setdefault(call_key(group.prompt), []).append(group.index)
        for step in actions.step[trained].unique().tolist():
            for groups in keys.values():
                alike = torch.isin(actions.group, torch.tensor(groups))
                rows = (trained & (actions.step == step) & alike).nonzero().squeeze(1)
                for states in actions.state[rows].unique().split(self.config.train.train_batch):
                    part = rows[torch.isin(actions.state[rows], states)]
                    yield actions.select(part), advantages[part]

    def _loss(
        self,
        experience: Experience,
        actions: Actions,
        advantage: Float[Tensor, " actions"],
        anchor: "_Anchor | None",
        statistics: "Statistics",
        first: bool,
    ) -> Float[Tensor, ""]:
        """The summed loss of actions that share a step; one forward pass serves a shared state."""
        settings = self.config.loss
        record = self._replay(experience, actions)
        rows, advantage = actions.state.to(self.policy.device), advantage.to(self.policy.device)
        if isinstance(settings, ClippedLoss):
            guarded = settings.ratio == "guard"
            weight = guard_weight(experience.transition, record.interval) if guarded else 1.0
            surrogate, change, outside = self._clipped(settings, actions, record, advantage, weight)
            statistics.ratios(record.step, change, outside, first)
        else:
            with torch.no_grad(), self.acting():
                old_x0 = self._replay(experience, actions).prediction.x0[rows]
            sample = actions.x_next.to(self.policy.device)
            surrogate = settings.loss(record.prediction.x0[rows], old_x0, sample, advantage)
        loss = surrogate.sum()
        kl = torch.zeros_like(surrogate)
        if anchor is not None:
            gap = record.prediction.output - anchor.output.to(self.policy.device)
            mean, std = anchor.mean.to(self.policy.device), anchor.std
            reference = Gaussian(mean, std.to(mean.device) if isinstance(std, Tensor) else std)
            distance = (
                settings.kl_to(record.gaussian, reference, record.interval, gap)
                if isinstance(settings, ClippedLoss)
                else velocity_kl(gap)
            )
            kl = distance[rows]
            loss = loss + settings.kl_coef * kl.sum()
        statistics.losses.append(surrogate.detach())
        statistics.kls.append(kl.detach())
        return loss

    def _clipped(
        self,
        settings: ClippedLoss,
        actions: Actions,
        record: StepRecord,
        advantage: Float[Tensor, " actions"],
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each action: the clipped loss, the log-ratio, and whether it is out of bounds."""
        gaussian = _spread(record.gaussian, actions.state)
        x_next = actions.x_next.to(gaussian.mean.device)
        old_mean = actions.old_mean
        if settings.needs_old_mean and old_mean is None:
            if self.config.train.updates > 1:
                raise ValueError(
                    f"algorithm {type(self.config.algorithm).__name__} keeps no means of its steps, which "
                    "loss.ratio = 'guard' and loss.clip = 'kl' need with train.updates above 1"
                )
            old_mean = gaussian.mean.detach()
        old_mean = None if old_mean is None else old_mean.to(gaussian.mean.device)
        change = settings.log_ratio(gaussian, x_next, actions.old_log_prob.to(x_next), old_mean)
        loss, outside = settings.surrogate(change, advantage.to(change), gaussian, old_mean, weight)
        return loss, change, outside

    def _follow(self) -> None:
        """After an iteration, let the weights that sample follow the trained ones."""
        if self.sampler is not None:
            assert isinstance(self.config.loss, NFTLoss)
            kept = self.config.loss.kept(self.num_updates)
            trained = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.sampler, trained, 1 - kept)

    def _replay(self, experience: Experience, actions: Actions) -> StepRecord:
        """One forward pass on the states of actions that share a step."""
        prompts = {g.index: g.prompt for g in experience.groups}
        group_of_state = torch.zeros(len(actions.states), dtype=torch.long)
        group_of_state[actions.state] = actions.group
        owners = [prompts[int(g)] for g in group_of_state]
        step = int(actions.step[0])
        return self.policy.replay(owners, actions.states, step, experience.transition)

    def _anchors(self, experience: Experience, batches: Sequence[Actions]) -> list["_Anchor"]:
        """What the reference says about every batch, so that it is brought in once per update."""
        if not batches:
            return []
        with torch.no_grad(), self.policy.reference():
            records = (self._replay(experience, actions) for actions in batches)
            return [_Anchor.of(record) for record in records]

    def _drift(self, experience: Experience) -> dict[str, float]:
        """How far the policy is from the reference, on a few of the iteration's states."""
        t, actions = self.config.train, experience.actions
        if t.monitor_states == 0:
            return {}
        key = {g.index: call_key(g.prompt) for g in experience.groups}
        alike = [i for i, k in key.items() if k == key[int(actions.group[0])]]
        same = (actions.step == actions.step[0]) & torch.isin(actions.group, torch.tensor(alike))
        first = actions.state[same].unique()
        chosen = torch.isin(actions.state, first[: min(t.monitor_states, t.train_batch)])
        few = actions.select(chosen.nonzero().squeeze(1))
        (anchor,) = self._anchors(experience, [few])
        with torch.no_grad():
            gap = self._replay(experience, few).prediction.output.cpu() - anchor.output
        squares = gap.float().square().flatten(1).mean(1)
        mean = self.accelerator.gather(squares.mean().reshape(1).to(self.policy.device)).mean()
        return {"kl/velocity": float(mean)}

    def _step(self, statistics: "Statistics") -> None:
        """Clip the gradient and step, unless the gradient is a spike or not finite."""
        self._average_gradients()
        t = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.num_updates)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, t.max_grad_norm))
        known = self.gradient_norms
        usual = median(known) if len(known) >= MIN_NORMS_FOR_SPIKE else float("inf")
        is_spike = t.spike_factor > 0 and norm > t.spike_factor * usual
        skipped = is_spike or not norm < float("inf")
        if not skipped:
            self.optimizer.step()
            self.gradient_norms = [*known, norm][-GRADIENT_NORMS_KEPT:] if norm > 0 else known
            if self.ema is not None:
                self.ema.update()
        elif self.accelerator.scaler is not None:
            # The scaler has unscaled these gradients, and must know that their step is over.
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        statistics.stepped(norm, self.learning_rate(self.num_updates - 1), skipped)

    def _average_gradients(self) -> None:
        """Sum the gradients of all ranks in one message; the loss is already divided by the total."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
            flat = self.accelerator.reduce(flat, "sum")
            for parameter, part in zip(
                self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an optimizer step."""
        t = self.config.train
        warm = min(1.0, (update + 1) / (t.warmup + 1))
        done = update / max(1, t.iterations * t.updates)
        fall = {
            "constant": 1.0,
            "linear": 1 - 0.9 * done,
            "cosine": 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * done))),
        }[t.schedule]
        return t.lr * warm * fall

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that a checkpoint must hold, as tensors and as JSON."""
        names: dict[Any, str] = dict(zip(self.parameters, self.named, strict=True))
        moments = {
            f"{names[p]}/{k}": torch.as_tensor(v)
            for p, state in self.adam.state.items()
            for k, v in state.items()
        }
        parts: dict[str, dict[str, Tensor]] = {"weights": dict(self.named), "optimizer": moments}
        if self.ema is not None:
            parts["ema"] = dict(zip(self.named, self.ema.average, strict=True))
        if self.sampler is not None:
            parts["sampler"] = dict(zip(self.named, self.sampler, strict=True))
        state = {
            "num_updates": self.num_updates,
            "gradient_norms": self.gradient_norms,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        return parts, state

    def restore(self, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state."""
        assert self.policy.trainable is not None
        self.policy.trainable.load(parts["weights"])
        for name, parameter in self.named.items():
            own = {
                k.rsplit("/", 1)[1]: v
                for k, v in parts["optimizer"].items()
                if k.rsplit("/", 1)[0] == name
            }
            if own:
                # AdamW keeps its step count on the CPU (the 8-bit one as a number) and its moments
                # beside the weights.
                is_plain = isinstance(self.adam, torch.optim.AdamW)
                self.adam.state[parameter] = {
                    k: (v if is_plain else int(v)) if k == "step" else v.to(parameter.device)
                    for k, v in own.items()
                }
        self.num_updates = state["num_updates"]
        self.gradient_norms = state["gradient_norms"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
            for average, name in zip(self.ema.average, self.named, strict=True):
                average.copy_(parts["ema"][name])
        if self.sampler is not None:
            for weight, name in zip(self.sampler, self.named, strict=True):
                weight.copy_(parts["sampler"][name])


def _adamw(parameters: list[torch.nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """AdamW, with moments in fp32 or in 8 bits."""
    betas = (train.betas[0], train.betas[1])
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay
        )
    if parameters[0].device.type == "cpu":
        raise ValueError(
            "train.optimizer = 'adamw8bit' runs on an accelerator only; use 'adamw' on the CPU"
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay)


def _spread(gaussian: Gaussian, state: Int[Tensor, " actions"]) -> Gaussian:
    """The distribution of each action from that of the state it starts in."""
    return Gaussian(
        gaussian.mean[state.to(gaussian.mean.device)], gaussian.std, gaussian.normalised
    )


@dataclass(frozen=True)
class _Anchor:
    """What the reference model says about a batch of states, on the CPU."""

    mean: Float[Tensor, "states *latent"]
    std: float | Float[Tensor, "#states *latent"]
    output: Float[Tensor, "states *latent"]

    @classmethod
    def of(cls, record: StepRecord) -> "_Anchor":
        std = record.gaussian.std
        kept = std.cpu() if isinstance(std, Tensor) else std
        return cls(record.gaussian.mean.cpu(), kept, record.prediction.output.cpu())
