"""How the score of a policy's own samples is learned, for distribution matching."""

from dataclasses import dataclass

from flowgrpo.losses.checks import require_at_least


@dataclass(frozen=True, kw_only=True)
class FakeScore:
    """How the score of the generator's own samples is learned, after each rollout.

    The fake score has values of its own for the trained weights, and an AdamW of its own. It begins as the
    first teacher, and is trained to predict the iteration's samples from noised versions of them.
    """

    lr: float = 3e-5
    """Learning rate; 3e-5 in RTDMD, ten times the policy's."""
    updates: int = 1
    """Optimizer steps per iteration, all on its samples and each with noise of its own. RTDMD takes 1 with
    rewards; in its distillation 10, each with new samples."""
    num_times: int = 4
    """Noise levels of an optimizer step, one from each part of the range; the samples take turns. More are
    more varied, and make more and smaller batches."""
    range: tuple[float, float] = (0.02, 0.98)
    """The smallest and the largest noise level: ``sigma`` of a flow, in (0, 1), and of other models the share
    of the timesteps. Levels are drawn uniformly and moved to the nearest node of the grid; RTDMD's are
    continuous. A scheduler with a large shift has few nodes at low noise: with diffusers'
    ``FlowMatchEulerDiscreteScheduler``, its own sigmas and a static shift of 12, levels below 0.126 all
    become 0.126, which no ``grid`` changes."""
    grid: int = 100
    """Steps of the pipeline's own grid, among whose nodes noise levels are taken."""
    weight_cap: float = 10.0
    """The squared error of a flow's velocity has the weight ``min(1, weight_cap sigma^2)``, as in RTDMD's
    code. 0 weighs all noise levels alike (DMD2)."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; a larger one is scaled down to it."""

    def check(self) -> None:
        """Raise ValueError if a setting is out of range."""
        for key in ("lr", "max_grad_norm"):
            require_at_least(f"fake.{key}", getattr(self, key), 1e-12)
        for key, least in (("updates", 1), ("num_times", 1), ("weight_cap", 0.0), ("grid", 2)):
            require_at_least(f"fake.{key}", getattr(self, key), least)
        if self.grid > 1000:
            raise ValueError(f"loss.fake.grid must be at most 1000 steps, got {self.grid}")
        if len(self.range) != 2 or not 0 < self.range[0] < self.range[1] < 1:
            raise ValueError(
                f"loss.fake.range must be two numbers that rise within (0, 1), got {list(self.range)}"
            )
