"""A loss of your own: a penalty on the change of the ratio in place of a clip (arXiv:2401.16025)."""

from dataclasses import dataclass, replace

import torch

import flowgrpo
from flowgrpo.losses.base import Loss, LossInputs, LossMetric, LossOutputs


@dataclass(frozen=True, kw_only=True)
class PenalisedRatio(Loss):
    kind: str = "penalised_ratio"
    width: float = 1e-4  # the change of the ratio at which the loss is smallest
    metrics = (LossMetric("ratio/deviation", by_step="ratio_deviation"),)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        log_prob = inputs.gaussian.log_prob(inputs.x_next)  # under the policy that is trained
        change = torch.expm1(log_prob - inputs.old_log_prob)  # ratio - 1, one value per action
        penalty = inputs.advantage.abs() * change.square() / (2 * self.width)
        loss = penalty - inputs.advantage * change
        return LossOutputs(loss, metrics={"ratio/deviation": change.abs()})

    def check(self):
        if not self.width > 0:
            raise ValueError(f"loss.width must be above 0, got {self.width}")


if __name__ == "__main__":
    few = ["train.iterations=1", "train.groups=6", "algorithm.group_size=4"]
    config = flowgrpo.load(
        "quickstart_flow_grpo", [*few, "evaluation.images=6", "run.folder=own_loss"]
    )
    flowgrpo.train(replace(config, loss=PenalisedRatio(width=1e-3)))
