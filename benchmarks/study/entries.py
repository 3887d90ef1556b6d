"""The entries of the study: one per method, as settings on top of the quick start.

All entries have the same initial weights, rewards, prompts, number of images per iteration, schedule and,
where steps are stochastic, transition (coefficients-preserving sampling). Entries that train steps with
different noise in one iteration use GRPO-Guard's ratio; without it the last steps, which have the least
noise, would dominate the gradient. The learning rate and one constant are tuned for each entry.
"""

from dataclasses import dataclass

GROUPS, GROUP_SIZE = 6, 12
"""Prompts per iteration, one of each task, and samples of each. Larger iterations would be too few in a minute."""
RATES = (1e-4, 3e-4, 9e-4)
"""Learning rates that are tried for each entry."""
COMMON = (
    f"train.groups={GROUPS}",
    f"train.rollout_batch={GROUPS * GROUP_SIZE}",
    "train.train_batch=72",
    "train.warmup=2",
    "train.schedule='linear'",
    "train.monitor_states=0",
    "evaluation.regimes=[]",
)
"""Settings of all entries; the learning rate falls to a tenth by the end of every run."""
CPS = "transition={kind='cps', noise_level=0.7}"
ONE_EARLY = "steps={kind='random_window', size=1, first=0, last=4}"
GUARD = "loss={ratio='guard', clip_range=1e-3}"
PROXY = "{name='proxy', model='benchmarks.study.held_out_reward:PaletteReward', weight=0.0}"
"""A reward that is only measured; GARDO compares the trained reward with it."""


@dataclass(frozen=True)
class Entry:
    """One row of the study.

    Attributes:
        name: Name in the tables.
        settings: ``--set`` arguments on top of the quick start, with ``{}`` in the place of the constant.
        constant: What the tuned constant is, in words.
        values: The values of the constant that are tried.
        credited: Whether the method gives credit to denoising steps, which ``claims`` measures.
    """

    name: str
    settings: tuple[str, ...]
    constant: str
    values: tuple[str, str]
    credited: bool = True

    @property
    def slug(self) -> str:
        """The name as a file name."""
        plain = (c if c.isascii() and c.isalnum() else " " for c in self.name.lower())
        return "-".join("".join(plain).split())

    def with_value(self, value: str) -> tuple[str, ...]:
        """The settings with a value of the constant."""
        return tuple(s.replace("{}", value) for s in self.settings)


def _algorithm(kind: str, *settings: str, size: int = GROUP_SIZE) -> str:
    table = ", ".join([f"kind='{kind}'", f"group_size={size}", *settings])
    return f"algorithm={{{table}}}"


ALGORITHMS = (
    Entry(
        "Flow-GRPO-Fast",
        (
            _algorithm(
                "flow_grpo", CPS, "shared_noise=true", "advantage={std='group'}",
                "steps={kind='random_window', size={}, first=0, last=4}",
            ),
        ),
        "stochastic steps",
        ("1", "2"),
    ),
    Entry(
        "Flow-GRPO",
        (_algorithm("flow_grpo", "transition={kind='cps', noise_level={}}"), GUARD),
        "noise level",
        ("0.4", "0.8"),
    ),
    Entry(
        "MixGRPO",
        (
            _algorithm(
                "mix_grpo", CPS,
                "steps={kind='sliding_window', size={}, every=5, skip_last=3}",
            ),
            GUARD,
        ),
        "window",
        ("2", "4"),
    ),
    Entry(
        "DanceGRPO",
        (_algorithm("dance_grpo", CPS, "timestep_fraction={}"), GUARD),
        "share of the steps",
        ("0.3", "0.6"),
    ),
    Entry(
        "TempFlow-GRPO",
        (
            _algorithm(
                "tempflow_grpo", "seeds=2", CPS, "steps={kind='window', start=0, size={}}"
            ),
        ),
        "branched steps",
        ("2", "4"),
    ),
    Entry(
        "TP-GRPO",
        (
            _algorithm("tp_grpo", CPS, "steps={kind='random_steps', count={}, first=0, last=6}"),
            GUARD,
        ),
        "stochastic steps",
        ("2", "4"),
    ),
    Entry(
        "DiffusionNFT",
        (_algorithm("diffusion_nft", "timestep_fraction={}"), "loss={kind='nft'}"),
        "share of the times",
        ("0.25", "0.99"),
        credited=False,
    ),
    Entry(
        "Matching (AWM, V-GRPO)",
        (_algorithm("matching", "num_times={}"), "loss={kind='matching'}"),
        "times",
        ("2", "4"),
        credited=False,
    ),
    Entry(
        "DGPO",
        (_algorithm("matching", "num_times=2"), "loss={kind='dgpo', beta={}}"),
        "beta",
        ("10", "100"),
        credited=False,
    ),
    Entry(
        "CRD",
        (_algorithm("matching", "num_times=2"), "loss={kind='crd', beta={}}"),
        "beta",
        ("0.3", "1"),
        credited=False,
    ),
)  # fmt: skip
"""The methods that are compared first."""

FURTHER = (
    Entry(
        "Pref-GRPO",
        (
            _algorithm(
                "pref_grpo", CPS, ONE_EARLY, "shared_noise=true",
                "preference={kind='compared', reward='graded', weight=1.0, tie_margin={}}",
            ),
        ),
        "margin of ties",
        ("0.0", "0.05"),
    ),
    Entry("VGPO", (_algorithm("vgpo", CPS, "anchor={}"), GUARD), "anchor", ("0.0", "0.03")),
    Entry(
        "G²RPO",
        (
            _algorithm(
                "g2rpo", "granularities={}", CPS, "steps={kind='window', start=0, size=4}"
            ),
            GUARD,
        ),
        "granularities",
        ("[1]", "[1, 2]"),
    ),
    Entry(
        "BranchGRPO",
        (
            _algorithm("branch_grpo", "splits={}", "children=2", CPS, size=8),
            "train.groups=9",
            GUARD,
        ),
        "splits",
        ("[0, 1, 2]", "[0, 2, 4]"),
    ),
    Entry(
        "RAFT",
        (
            _algorithm(
                "matching", "num_times=2", "share_noise=false", "advantage={kind='best', keep={}}"
            ),
            "loss={kind='matching', weight='uniform'}",
            "train.without_advantage='drop'",
        ),
        "samples kept",
        ("1", "3"),
        credited=False,
    ),
    Entry(
        "Online DPO",
        (
            _algorithm("matching", "num_times=2"),
            "loss={kind='dpo', beta={}}",
        ),
        "beta",
        ("100", "1000"),
        credited=False,
    ),
    Entry(
        "Matching + guided reference",
        (
            _algorithm("matching", "num_times=2"),
            "loss={kind='matching', kl_coef={}, reference_guidance=3.0}",
        ),
        "weight of the KL",
        ("0.3", "1.0"),
        credited=False,
    ),
    Entry(
        "Matching + GARDO",
        (
            _algorithm("matching", "num_times=2"),
            "loss={kind='matching', kl_coef={}}",
            "guard={kl='uncertain', novelty='relative', measured=['proxy']}",
            "rewards=[{name='strict', model='flowgrpo.shapes.rewards:Strict', weight=0.25}, "
            "{name='graded', model='flowgrpo.shapes.rewards:Graded', weight=0.75}, "
            f"{PROXY}]",
        ),
        "weight of the KL",
        ("0.1", "1.0"),
        credited=False,
    ),
    Entry(
        "Flash-GRPO",
        (
            _algorithm(
                "flow_grpo", CPS, "steps_per='group'",
                "steps={kind='random_window', size=1, first=0, last={}}",
            ),
            "loss={step_weight='rectified'}",
        ),
        "last step",
        ("4", "6"),
    ),
    Entry(
        "Chunk-GRPO",
        (
            _algorithm("flow_grpo", "transition={kind='cps', noise_level=0.4}"),
            "loss={chunks={}}",
            "train.updates=2",
        ),
        "chunks",
        ("[2, 2, 3]", "[7]"),
    ),
    Entry(
        "Neighbor GRPO",
        (_algorithm("neighbor_grpo", "perturbation={}"), "loss={kind='neighbor'}"),
        "perturbation",
        ("0.3", "0.6"),
        credited=False,
    ),
    Entry(
        "Stepwise-Flow-GRPO",
        (
            _algorithm(
                "tp_grpo", "turning_points='none'", "rivals='group'", "completion_steps={}",
                "shared_noise=true", CPS, "steps={kind='window', start=0, size=4}",
            ),
            GUARD,
        ),
        "steps of a completion",
        ("2", "4"),
    ),
)  # fmt: skip
"""Methods that are compared when those above are done."""

FLAWED = (
    "rewards=[{name='inked', model='benchmarks.study.flawed_reward:Inked'}, "
    "{name='strict', model='flowgrpo.shapes.rewards:Strict', weight=0.0}, "
    "{name='graded', model='flowgrpo.shapes.rewards:Graded', weight=0.0}, "
    f"{PROXY}]"
)
"""Training on a reward with a small bias to exploit; the true scores are recorded with weight 0."""
