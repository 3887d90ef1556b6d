"""The metrics of one iteration, over all processes: of its rollouts and of its updates."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flowgrpo.core.group_statistics import zero_variance_groups
from flowgrpo.data.experience import Experience
from flowgrpo.losses.base import LossMetric
from flowgrpo.training.shares import Shares


def rollout_metrics(experience: Experience, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Rewards, scores, diversity and cost of an iteration's rollouts.

    Args:
        experience: The experience of this process, with the candidates of all in ``gathered``.
        gather: Concatenates a tensor of each process.
    """
    c, everyone = experience.candidates, experience.all_candidates
    # Each process has equally many prompts.
    cost = torch.tensor([[experience.cost.nfe, experience.cost.decodes]], dtype=torch.float64)
    nfe, decodes = gather(cost).mean(0).tolist()
    work = {"nfe_per_prompt": nfe, "decodes_per_prompt": decodes}
    # The algorithm judges nothing, in all processes, or there are no rewards.
    if len(c) == 0 or not everyone.scores.raw:
        return {"failures": 0.0, **work}
    finite = everyone.reward[everyone.valid]
    flat = gather(zero_variance_groups(c.reward, c.group).float())
    return {
        "reward": float(finite.mean()),
        "reward_std": float(finite.std(correction=0)),
        **{f"score/{k}": float(v[v.isfinite()].mean()) for k, v in everyone.scores.raw.items()},
        **{f"part/{k}": float(v[v.isfinite()].mean()) for k, v in everyone.scores.parts().items()},
        "group/zero_variance": float(flat.mean()),
        "group/diversity": float(gather(experience.diversity).mean()),
        "group/duplicates": float(gather(experience.duplicates).sum()),
        "failures": float((~everyone.valid).sum()),
        **work,
        **_means({name: gather(values) for name, values in experience.by_group.items()}),
    }


def _means(by_group: Mapping[str, Tensor]) -> dict[str, float]:
    """The means over the groups for which a metric is defined; without those defined for none."""
    known = {name: values[~values.isnan()] for name, values in by_group.items()}
    return {name: float(values.double().mean()) for name, values in known.items() if len(values)}


class UpdateStatistics:
    """Collects the values of an iteration's optimizer steps and reduces them to metrics.

    It knows the losses' metrics by declaration only (:class:`flowgrpo.losses.base.LossMetric`).
    """

    def __init__(self, declared: Sequence[LossMetric]):
        self.declared = declared
        self.values: dict[str, dict[int, list[Tensor]]] = {
            metric.name: defaultdict(list) for metric in declared
        }
        """Values by name and denoising step, in the order in which they came."""
        self.losses: list[Tensor] = []
        self.kls: list[Tensor] = []
        self.norms: list[float] = []
        self.lr, self.skipped = 0.0, 0

    def add(self, step: int, loss: Tensor, kl: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Note the loss of a batch of actions of one denoising step, its KL and its metrics.

        Raises:
            ValueError: If the loss has not declared a metric that it returns.
        """
        self.losses.append(loss.detach())
        self.kls.append(kl.detach())
        for name, values in metrics.items():
            if name not in self.values:
                raise ValueError(
                    f"the loss returned the metric {name!r} without declaring it; add "
                    f"LossMetric({name!r}) to its class attribute 'metrics'"
                )
            self.values[name][step].append(values.detach())

    def stepped(self, norm: float, lr: float, skipped: bool) -> None:
        """Note an optimizer step."""
        self.norms.append(norm)
        self.lr = lr
        self.skipped += skipped

    def summary(self, shares: Shares) -> dict[str, float]:
        """The metrics over all processes; each process must call this."""
        metrics = {
            "loss/policy": _mean(self.losses, shares),
            "loss/kl": _mean(self.kls, shares),
            "grad_norm": sum(self.norms) / len(self.norms),
            "lr": self.lr,
            "skipped_updates": float(self.skipped),
        }
        for metric in self.declared:
            parts = [part for own in self.values[metric.name].values() for part in own]
            reduce = _max if metric.reduce == "max" else _mean
            metrics[metric.name] = reduce(parts, shares)
        return metrics | self._by_step(shares)

    def _by_step(self, shares: Shares) -> dict[str, float]:
        """Means of single denoising steps, for the metrics that ask for them."""
        own = {
            (step, metric.by_step): (float(torch.cat(parts).mean()), sum(map(len, parts)))
            for metric in self.declared
            if metric.by_step
            for step, parts in self.values[metric.name].items()
        }
        every = shares.gather_objects([own])
        found = {}
        for step, name in sorted({key for part in every for key in part}):
            parts = [part[step, name] for part in every if (step, name) in part]
            number = sum(n for _, n in parts)
            found[f"step/{step}/{name}"] = sum(mean * n for mean, n in parts) / number
        return found


def _mean(parts: Sequence[Tensor], shares: Shares) -> float:
    total = torch.stack(
        [
            torch.stack([p.sum() for p in parts]).sum()
            if parts
            else torch.zeros((), device=shares.accelerator.device),
            torch.tensor(float(sum(p.numel() for p in parts)), device=shares.accelerator.device),
        ]
    )
    total = shares.sum(total)
    return float(total[0] / total[1].clamp(min=1))


def _max(parts: Sequence[Tensor], shares: Shares) -> float:
    largest = (
        torch.stack([p.max() for p in parts]).max()
        if parts
        else torch.zeros((), device=shares.accelerator.device)
    )
    return float(shares.gather(largest.reshape(1)).max())
