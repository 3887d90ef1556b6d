"""What happens in the updates of one iteration, as metrics over all ranks."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class Statistics:
    """Running sums of what happens in the updates of one iteration."""

    def __init__(self, has_ratios: bool):
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
