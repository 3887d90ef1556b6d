"""From experience and advantages to new weights: loss, gradients, optimizer, moving average."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.core.losses import ClippedLoss, NFTLoss, guard_weight, velocity_kl
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Gaussian
from flowgrpo.experience import Actions, Experience
from flowgrpo.policy import EMA, PipelinePolicy
from flowgrpo.policy.scheduler import Visit
from flowgrpo.policy.weights import swapped

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
        adam = torch.optim.AdamW(
            self.parameters, lr=t.lr, betas=(t.betas[0], t.betas[1]), weight_decay=t.weight_decay
        )
        self.adam = adam
        self.optimizer = accelerator.prepare(adam)
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
        statistics = _Statistics(isinstance(self.config.loss, ClippedLoss))
        updates = self.config.train.updates
        order = torch.randperm(self.config.train.groups, generator=random.generator("updates"))
        for update in range(updates):
            chosen = torch.isin(experience.actions.group, order[update::updates])
            number = self.accelerator.reduce(chosen.sum().to(self.policy.device), "sum").item()
            trained = chosen if self.config.loss.kl_coef > 0 else chosen & (advantages != 0)
            for actions, advantage in self._batches(experience.actions, advantages, trained):
                loss = self._loss(experience, actions, advantage, statistics, first=update == 0)
                self.accelerator.backward(loss / number)
            self._step(statistics)
        self._follow()
        return statistics.summary(self.accelerator)

    def _batches(
        self, actions: Actions, advantages: Tensor, trained: Tensor
    ) -> Iterator[tuple[Actions, Tensor]]:
        """Actions of one step each, on at most ``train_batch`` states: what one forward serves."""
        for step in actions.step[trained].unique().tolist():
            rows = (trained & (actions.step == step)).nonzero().squeeze(1)
            for states in actions.state[rows].unique().split(self.config.train.train_batch):
                part = rows[torch.isin(actions.state[rows], states)]
                yield actions.select(part), advantages[part]

    def _loss(
        self,
        experience: Experience,
        actions: Actions,
        advantage: Float[Tensor, " actions"],
        statistics: "_Statistics",
        first: bool,
    ) -> Float[Tensor, ""]:
        """The summed loss of actions that share a step; one forward pass serves a shared state."""
        settings, policy = self.config.loss, self.policy
        prompts = {g.index: g.prompt for g in experience.groups}
        group_of_state = torch.zeros(len(actions.states), dtype=torch.long)
        group_of_state[actions.state] = actions.group
        owners = [prompts[int(g)] for g in group_of_state]
        step = int(actions.step[0])
        visit = policy.replay(owners, actions.states, step, experience.transition)
        advantage = advantage.to(policy.device)
        if isinstance(settings, ClippedLoss):
            guarded = settings.ratio == "guard"
            weight = guard_weight(experience.transition, visit.interval) if guarded else 1.0
            surrogate, change, outside = self._clipped(settings, actions, visit, advantage, weight)
            statistics.ratios(step, change, outside, first)
        else:
            with torch.no_grad(), self.acting():
                old = policy.replay(owners, actions.states, step, experience.transition)
            rows = actions.state.to(policy.device)
            x0, old_x0 = visit.prediction.x0[rows], old.prediction.x0[rows]
            surrogate = settings.loss(x0, old_x0, actions.x_next.to(policy.device), advantage)
        loss = surrogate.sum()
        kl = torch.zeros_like(surrogate)
        if settings.kl_coef > 0:
            with torch.no_grad(), policy.reference():
                anchor = policy.replay(owners, actions.states, step, experience.transition)
            gap = visit.prediction.output - anchor.prediction.output
            distance = (
                settings.kl_to(visit.gaussian, anchor.gaussian, visit.interval, gap)
                if isinstance(settings, ClippedLoss)
                else velocity_kl(gap)
            )
            kl = distance[actions.state.to(gap.device)]
            loss = loss + settings.kl_coef * kl.sum()
        statistics.losses.append(surrogate.detach())
        statistics.kls.append(kl.detach())
        return loss

    def _clipped(
        self,
        settings: ClippedLoss,
        actions: Actions,
        visit: Visit,
        advantage: Float[Tensor, " actions"],
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each action: the clipped loss, the log-ratio, and whether it is out of bounds."""
        gaussian = _spread(visit.gaussian, actions.state)
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

    def _step(self, statistics: "_Statistics") -> None:
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
            f"{names[p]}/{k}": v for p, state in self.adam.state.items() for k, v in state.items()
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
                # AdamW keeps its step count on the CPU and its moments beside the weights.
                self.adam.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in own.items()
                }
        self.num_updates = state["num_updates"]
        self.gradient_norms = state["gradient_norms"]
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
            for average, name in zip(self.ema.average, self.named, strict=True):
                average.copy_(parts["ema"][name])
        if self.sampler is not None:
            for weight, name in zip(self.sampler, self.named, strict=True):
                weight.copy_(parts["sampler"][name])


def _spread(gaussian: Gaussian, state: Int[Tensor, " actions"]) -> Gaussian:
    """The distribution of each action from that of the state it starts in."""
    return Gaussian(
        gaussian.mean[state.to(gaussian.mean.device)], gaussian.std, gaussian.normalised
    )


class _Statistics:
    """Running sums of what happens in the updates of one iteration."""

    def __init__(self, has_ratios: bool) -> None:
        self.has_ratios = has_ratios
        self.by_step: dict[int, list[Tensor]] = {}
        self.outside: dict[int, list[Tensor]] = {}
        self.losses: list[Tensor] = []
        self.kls: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.norms: list[float] = []
        self.lr, self.skipped = 0.0, 0

    def ratios(self, step: int, change: Tensor, outside: Tensor, first: bool) -> None:
        """Note the log-ratios of one forward pass, and which are out of bounds."""
        self.by_step.setdefault(step, []).append(change.detach())
        self.outside.setdefault(step, []).append(outside.float())
        if first:
            # Nothing has been updated yet, so any change is numerical noise.
            self.noise.append(change.detach().abs())

    def stepped(self, norm: float, lr: float, skipped: bool) -> None:
        """Note an optimizer step."""
        self.norms.append(norm)
        self.lr = lr
        self.skipped += skipped

    def summary(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics, over all ranks."""
        metrics = {
            "loss/policy": self._mean(self.losses, accelerator),
            "loss/kl": self._mean(self.kls, accelerator),
            "grad_norm": sum(self.norms) / len(self.norms),
            "lr": self.lr,
            "skipped_updates": float(self.skipped),
        }
        if not self.has_ratios:
            return metrics
        metrics["log_prob/noise"] = self._max(self.noise, accelerator)
        changes = [c for parts in self.by_step.values() for c in parts]
        ratios = [torch.expm1(c) for c in changes]
        metrics["ratio/deviation"] = self._mean([r.abs() for r in ratios], accelerator)
        metrics["ratio/clip_fraction"] = self._mean(
            [o for parts in self.outside.values() for o in parts], accelerator
        )
        if accelerator.num_processes == 1:
            for step, parts in sorted(self.by_step.items()):
                ratio = torch.expm1(torch.cat(parts))
                metrics[f"step/{step}/ratio_deviation"] = float(ratio.abs().mean())
                metrics[f"step/{step}/clip_fraction"] = float(torch.cat(self.outside[step]).mean())
        return metrics

    @staticmethod
    def _mean(parts: Sequence[Tensor], accelerator: Accelerator) -> float:
        total = torch.stack(
            [
                torch.stack([p.sum() for p in parts]).sum()
                if parts
                else torch.zeros((), device=accelerator.device),
                torch.tensor(float(sum(p.numel() for p in parts)), device=accelerator.device),
            ]
        )
        total = accelerator.reduce(total, "sum")
        return float(total[0] / total[1].clamp(min=1))

    @staticmethod
    def _max(parts: Sequence[Tensor], accelerator: Accelerator) -> float:
        largest = (
            torch.stack([p.max() for p in parts]).max()
            if parts
            else torch.zeros((), device=accelerator.device)
        )
        return float(accelerator.gather(largest.reshape(1)).max())
