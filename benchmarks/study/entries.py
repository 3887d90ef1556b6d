"""The entries of the study: one per algorithm, as settings on top of the quick start.

All entries have the same initial weights, rewards, learning rate, prompts, group size and transition
(coefficients-preserving sampling at 0.7). Entries that train steps with different noise use GRPO-Guard's
ratio; without it the last steps, which have the least noise, would dominate the gradient, as one entry
shows. Entries differ in which candidates each step is credited with.
"""

from dataclasses import dataclass

PROMPTS = 18
"""Prompts per iteration."""
IMAGES = 480
"""Held-out images per evaluation."""
CPS = "transition={kind='cps', noise_level=0.7}"
ONE_EARLY = "steps={kind='random_window', size=1, first=0, last=4}"
THREE = "steps={kind='random_steps', count=3, first=0, last=6}"
FOUR_EARLY = "steps={kind='window', start=0, size=4}"
GUARD = "loss={ratio='guard', clip_range=1e-3}"


@dataclass(frozen=True)
class Entry:
    """One row of the study.

    Attributes:
        name: Name in the tables.
        settings: ``--set`` arguments on top of the quick start.
    """

    name: str
    settings: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a file name."""
        plain = (c if c.isascii() and c.isalnum() else " " for c in self.name.lower())
        return "-".join("".join(plain).split())


def _algorithm(kind: str, *settings: str) -> str:
    table = ", ".join([f"kind='{kind}'", "group_size=16", *settings])
    return f"algorithm={{{table}}}"


ALGORITHMS = (
    Entry("Flow-GRPO-Fast (quick start)"),
    Entry("Flow-GRPO", (_algorithm("flow_grpo", CPS), GUARD)),
    Entry("Flow-GRPO, 3 steps", (_algorithm("flow_grpo", CPS, THREE), GUARD)),
    Entry("Flow-GRPO, 3 steps, plain ratio", (_algorithm("flow_grpo", CPS, THREE),)),
    Entry("DanceGRPO", (_algorithm("dance_grpo", CPS), GUARD)),
    Entry(
        "MixGRPO",
        (
            _algorithm(
                "mix_grpo", CPS, "steps={kind='sliding_window', size=2, every=10, skip_last=3}"
            ),
            GUARD,
        ),
    ),
    Entry(
        "Pref-GRPO",
        (
            _algorithm(
                "pref_grpo", CPS, ONE_EARLY, "shared_noise=true",
                "preference={kind='compared', reward='graded', weight=1.0}",
            ),
        ),
    ),
    Entry("DiffusionNFT", (_algorithm("diffusion_nft"), "loss={kind='nft'}")),
    Entry("TempFlow-GRPO", (_algorithm("tempflow_grpo", "seeds=2", CPS, FOUR_EARLY),)),
    Entry("G²RPO", (_algorithm("g2rpo", "granularities=[1, 2]", CPS, FOUR_EARLY), GUARD)),
    Entry("TP-GRPO, 3 steps", (_algorithm("tp_grpo", CPS, THREE), GUARD)),
    Entry("VGPO", (_algorithm("vgpo", CPS), GUARD)),
    Entry(
        "BranchGRPO",
        (_algorithm("branch_grpo", "splits=[0, 1, 2, 3]", "children=2", CPS), GUARD),
    ),
    Entry(
        "FIND",
        (
            _algorithm("find"),
            "model.weights={kind='noise'}",
            "loss={clip_range=0.2}",
            "train.lr=1e-2",
            "train.monitor_states=0",
        ),
    ),
)  # fmt: skip


def _rewards(proxy_weight: float) -> str:
    true = ", ".join(
        f"{{name='{n}', model='flowgrpo.shapes.rewards:{n.capitalize()}', weight=0.0}}"
        for n in ("strict", "graded")
    )
    return f"rewards=[{{name='inked', model='benchmarks.study.flawed_reward:Inked', weight={proxy_weight}}}, {true}]"


def _scored(std: str) -> tuple[str, ...]:
    advantage = f"advantage={{std='{std}'}}"
    algorithm = _algorithm("flow_grpo", CPS, ONE_EARLY, "shared_noise=true", advantage)
    return algorithm, _rewards(1.0)


def _compared(margin: float) -> tuple[str, ...]:
    preference = f"preference={{kind='compared', reward='inked', tie_margin={margin}}}"
    algorithm = _algorithm("pref_grpo", CPS, ONE_EARLY, "shared_noise=true", preference)
    return algorithm, _rewards(0.0)


OVEROPTIMISED = (
    Entry("Scores over the group's deviation", _scored("group")),
    Entry("Scores over the batch's deviation", _scored("batch")),
    Entry("Win rates", _compared(0.0)),
    Entry("Win rates, near scores tie", _compared(0.05)),
)
"""Entries trained on :class:`benchmarks.study.flawed_reward.Inked`, which has a small bias to exploit.
The true scores are recorded with weight 0."""
