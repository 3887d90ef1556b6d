"""An algorithm of your own: a sample's advantage is the share of its group that it beats."""

from dataclasses import dataclass, field, replace

import flowgrpo
from flowgrpo.algorithms import AlgorithmBase, credit, trajectories
from flowgrpo.core.transitions import CPS, Transition


@dataclass(frozen=True, kw_only=True)
class WinRate(AlgorithmBase):
    kind: str = "win_rate"
    group_size: int = 4
    transition: Transition = field(default_factory=CPS)

    def plan(self, num_steps, iteration, random):
        return trajectories.TrajectoryPlan(self.group_size, self.transition, [0, 1], True)

    def collect(self, policy, groups, scorer, random, iteration):
        plan = self.plan(policy.num_steps(), iteration, random)
        return trajectories.collect_trajectories(policy, groups, scorer, random, plan)

    def advantages(self, experience):
        c = experience.candidates
        duels = (c.group[:, None] == c.group) & c.valid[:, None] & c.valid
        won = (c.reward[:, None] - c.reward).nan_to_num().sign() * duels  # +1, 0 or -1
        share = won.sum(1) / duels.sum(1).clamp(min=1)
        return credit.credit_trajectories(experience.actions, c, share)

    def check(self, num_steps):
        if num_steps < 3:  # the last step is never stochastic
            raise ValueError(f"win_rate needs at least 3 steps, got {num_steps}")


if __name__ == "__main__":
    small = ["train.iterations=1", "train.groups=6", "evaluation.images=6"]
    config = flowgrpo.load("quickstart_flow_grpo", [*small, "run.folder=win_rate"])
    flowgrpo.train(replace(config, algorithm=WinRate(group_size=4)))
