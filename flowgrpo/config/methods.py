"""Published methods by name: the settings that select each, and the recipe that has all of its settings.

The name of a method is not always a kind: AWM, for instance, is the algorithm ``matching`` with the
loss ``matching``. ``flowgrpo config explain NAME`` and the errors about unknown kinds look here.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        names: Its names in papers and in released code; the first is the one to show.
        settings: Dotted keys and the values that select it. Other keys have values of their own, which
            the recipe shows.
        recipe: A shipped configuration of it; empty if there is none.
        base: For a method without a recipe, a shipped configuration to which its settings can be applied.
        note: Which of the values are a choice, or what else it needs; empty if there is nothing to say.
    """

    names: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    base: str = ""
    note: str = ""

    def words(self, name: str = "") -> str:
        """The settings and a configuration that has them or takes them, in words.

        Args:
            name: The name that was asked for, in any spelling; if it is not one of the method's, the first
                of these is shown.
        """
        shown = next((n for n in self.names if _bare(n) == _bare(name)), self.names[0])
        # JSON writes texts, numbers, booleans and lists of them as TOML does.
        first, *others = (f"{k} = {json.dumps(v)}" for k, v in self.settings.items())
        text = f"{shown} is {first}" + (f" with {', '.join(others)}" if others else "")
        if self.note:
            text += f" ({self.note})"
        if self.recipe:
            return f"{text}; all its settings: the recipe {self.recipe}"
        return f"{text}; it has no recipe, but these settings can be applied to {self.base}"


def _algorithm(kind: str, loss: str = "", **more: Any) -> dict[str, Any]:
    """The settings of a method; underscores between keys of tables are written ``__``."""
    settings = {"algorithm.kind": kind} | ({"loss.kind": loss} if loss else {})
    return settings | {k.replace("__", "."): v for k, v in more.items()}


def _elbo(**more: Any) -> dict[str, Any]:
    """The settings of an ELBO policy gradient (arXiv:2602.04663), with noise for each sample."""
    shared = {"algorithm__share_noise": False, "loss__weight": "adaptive", "loss__trail": "half"}
    return _algorithm("matching", "matching", **shared, **more)


METHODS = (
    Method(("Flow-GRPO",), _algorithm("flow_grpo"), "sd35_medium_pickscore"),
    Method(("Flow-GRPO-Fast",), _algorithm("flow_grpo", algorithm__steps__kind="random_window"), "sd35_medium_fast"),
    Method(("Flow-CPS", "CPS"), _algorithm("flow_grpo", algorithm__transition__kind="cps"), "flux_fast"),
    Method(("Flash-GRPO",), _algorithm("flow_grpo", algorithm__steps_per="group", loss__step_weight="rectified"), "wan21_t2v_flash"),
    Method(("GRPO-Guard",), _algorithm("flow_grpo", loss__ratio="guard"), "sd35_medium_guard"),
    Method(("Flow-DPPO", "DPPO"), _algorithm("flow_grpo", loss__clip="kl"), "sd35_medium_dppo"),
    Method(("GARDO",), _algorithm("flow_grpo", guard__kl="uncertain", guard__novelty="relative", guard__reset_every=16), "sd35_medium_gardo"),
    Method(("Chunk-GRPO", "GCPO"), _algorithm("flow_grpo", loss__chunks=[2, 3, 4, 7]), "flux_chunk"),
    Method(
        ("PaCo-RL", "PaCo-GRPO"), _algorithm("flow_grpo", algorithm__steps__kind="window", algorithm__steps__start=1, algorithm__steps__size=1), "flux_paco",
        note='the reward is vlm_consistency; the paper\'s log-taming, which the release leaves out, is algorithm.advantage.kind = "log_tamed"',
    ),
    Method(
        ("OP-GRPO",), _algorithm("flow_grpo", train__replay__groups=24, train__replay__keep="good", train__replay__skip_last=2), base="sd35_medium_pickscore",
        note="the numbers of replayed groups and of skipped steps are choices",
    ),
    Method(("DanceGRPO",), _algorithm("dance_grpo"), "flux_dance"),
    Method(("MixGRPO",), _algorithm("mix_grpo"), "flux_mix"),
    Method(
        ("MixGRPO-Flash",),
        _algorithm("mix_grpo", algorithm__flash=0.4, algorithm__flash_counts="nodes", algorithm__solver="dpm_2m_continued", algorithm__steps__every=20),
        "flux_mix_flash",
    ),
    Method(("Pref-GRPO",), _algorithm("pref_grpo"), "flux_pref"),
    Method(("GDPO",), {"algorithm.advantage.kind": "gdpo"}, "flux_pref"),
    Method(("BNPO",), {"algorithm.advantage.kind": "beta"}, base="sd35_medium_geneval", note="needs rewards of 0 and 1"),
    Method(("NGRPO",), {"algorithm.advantage.kind": "virtual_best"}, base="sd35_medium_geneval"),
    Method(("TempFlow-GRPO",), _algorithm("tempflow_grpo"), "sd35_medium_tempflow"),
    Method(("G2RPO", "G²RPO", "Granular-GRPO"), _algorithm("g2rpo"), "flux_g2rpo"),
    Method(("TP-GRPO", "TurningPoint-GRPO"), _algorithm("tp_grpo", algorithm__turning_points="consistent"), "sd35_medium_tp"),
    Method(
        ("DenseGRPO",), _algorithm("tp_grpo", algorithm__turning_points="none", algorithm__rivals="step", algorithm__completion_steps=0), "sd35_medium_dense",
        note='its noise, algorithm.transition.kind = "calibrated_sde", is calibrated for each model and reward',
    ),
    Method(
        ("Stepwise-Flow-GRPO",),
        _algorithm(
            "tp_grpo", algorithm__turning_points="none", algorithm__rivals="group", algorithm__completion_steps=5, algorithm__shared_noise=True,
            algorithm__steps__kind="window", algorithm__steps__start=1, algorithm__steps__size=8, algorithm__transition__kind="stepwise_sde", loss__kl="exact",
        ),
        base="sd35_medium_dense", note="for 10 sampling steps",
    ),
    Method(("VGPO",), _algorithm("vgpo"), "sd35_medium_vgpo"),
    Method(("BranchGRPO",), _algorithm("branch_grpo", algorithm__rivals="branches", algorithm__between="sde"), "flux_branch"),
    Method(
        ("TreeGRPO",),
        _algorithm(
            "branch_grpo", algorithm__group_size=16, algorithm__children=2, algorithm__splits=[0, 1, 2, 3], algorithm__shift_ratio=0.5,
            algorithm__between="ode", algorithm__rivals="leaves", algorithm__fusion="path_probability",
            algorithm__advantage__kind="group", algorithm__advantage__std="group",
        ),
        "sd35_medium_tree",
        note="the tree of the release's command; the paper's has 3 splits into 3, with a group_size of 27",
    ),
    Method(("DiffusionNFT", "NFT"), _algorithm("diffusion_nft", "nft"), "sd35_medium_nft"),
    Method(("Sol-RL",), _algorithm("diffusion_nft", "nft", algorithm__previews__number=96, algorithm__previews__num_steps=6), "sd35_large_sol"),
    Method(
        ("AWM", "Advantage Weighted Matching"),
        _algorithm(
            "matching", "matching", algorithm__share_noise=False, loss__weight="ghuber", loss__power=0.25, loss__advantage_scale=5.0,
            loss__trail="third", loss__sampler="trained", loss__proximal_coef=1.0,
        ),
        "sd35_medium_awm",
    ),
    Method(
        ("V-GRPO",), _algorithm("matching", "matching", algorithm__share_noise=True, algorithm__times="stratified", algorithm__num_times=4, loss__weight="adaptive", loss__soft_clip=3.0),
        base="quickstart",
        note='in place of loss.soft_clip: a loss.clip_range of 0.006 to 0.01, or loss.proximal = "data" with a loss.proximal_coef',
    ),
    Method(("EPG",), _elbo(loss__surrogate="ratio", loss__clip_range=1e6), base="quickstart", note="a range that large clips nothing"),
    Method(("PEPG", "PAR"), _elbo(loss__surrogate="pepg"), base="quickstart"),
    Method(("RAFT", "rejection sampling"), _algorithm("matching", "matching", algorithm__advantage__kind="best", algorithm__advantage__keep=1, loss__weight="uniform"), "sd35_medium_raft"),
    Method(("DGPO",), _algorithm("matching", "dgpo"), "sd35_medium_dgpo"),
    Method(("CRD",), _algorithm("matching", "crd"), "sd35_medium_crd"),
    Method(("Diffusion-DPO", "DPO", "Flow-DPO"), _algorithm("pairs", "dpo"), "sd15_dpo"),
    Method(("Online DPO",), _algorithm("matching", "dpo"), base="quickstart"),
    Method(
        ("Supervised fine-tuning", "SFT"), _algorithm("pictures", "supervised"), base="sd15_dpo",
        note="prompts.train is then a file or a folder of pictures with their prompts",
    ),
    Method(("Neighbor GRPO",), _algorithm("neighbor_grpo", "neighbor"), "flux_neighbor"),
    Method(("FIND",), _algorithm("find"), "sd15_find"),
    Method(("DiffusionOPD", "Flow-OPD", "OPD", "on-policy distillation"), _algorithm("distillation", "distillation"), "sd35_medium_opd"),
    Method(("Self-OPD",), _algorithm("self_opd", "self_opd"), "sd35_medium_self_opd"),
    Method(("DMD", "DMD2"), _algorithm("dmd", "dmd"), "sd35_medium_dmd"),
    Method(("RTDMD",), _algorithm("rtdmd", "dmd"), "sd35_medium_rtdmd"),
    Method(
        ("DRaFT",), _algorithm("draft", "reward_gradient", algorithm__last=50, algorithm__truncation="fixed"), base="sd15_alignprop",
        note="algorithm.last is sampling.num_steps",
    ),
    Method(
        ("DRaFT-K", "DRaFT-1"), _algorithm("draft", "reward_gradient", algorithm__last=1, algorithm__truncation="fixed"), base="sd15_alignprop",
        note="algorithm.last is K",
    ),
    Method(
        ("DRaFT-LV",), _algorithm("draft", "reward_gradient", algorithm__last=1, algorithm__truncation="fixed", algorithm__renoised=2), base="sd15_alignprop",
        note="algorithm.renoised is the number of noises for each sample",
    ),
    Method(("AlignProp",), _algorithm("draft", "reward_gradient", algorithm__last=50, algorithm__truncation="random"), "sd15_alignprop"),
    Method(("ReFL",), _algorithm("refl", "reward_gradient"), "sd14_refl"),
    Method(("SRPO",), _algorithm("srpo", "reward_gradient"), "flux_srpo"),
)  # fmt: skip
"""All methods that have a section in docs/algorithms.md."""


def method(name: str) -> Method | None:
    """The method of a name in any spelling, such as ``awm`` or ``flow_grpo_fast``; None if there is none."""
    return next((m for m in METHODS if _bare(name) in map(_bare, m.names)), None)


def similar(name: str) -> str:
    """``"; methods with similar names: ..."`` for up to three names that are nearest to an unknown one, or nothing."""
    names = {_bare(n): n for m in METHODS for n in m.names}
    close = [names[n] for n in difflib.get_close_matches(_bare(name), names, n=3, cutoff=0.6)]
    return f"; methods with similar names: {', '.join(close)}" if close else ""


def advice(kind: str) -> str:
    """``"; AWM is ..."`` if an unknown kind is the name of a method, or nothing."""
    found = method(kind)
    return "" if found is None else f"; {found.words(kind)}"


def partners(algorithm: str, loss: str) -> str:
    """Which losses the methods have with an algorithm, and which algorithms with a loss, in words.

    Args:
        algorithm: A kind, or the import path of another class, of which nothing is known.
        loss: Likewise.
    """
    pairs = [
        (m.settings["algorithm.kind"], m.settings.get("loss.kind", "clipped"))
        for m in METHODS
        if "algorithm.kind" in m.settings
    ]
    sides = {
        f"with algorithm.kind = {algorithm!r}, loss.kind": [b for a, b in pairs if a == algorithm],
        f"with loss.kind = {loss!r}, algorithm.kind": [a for a, b in pairs if b == loss],
    }
    known = {side: list(dict.fromkeys(kinds)) for side, kinds in sides.items() if kinds}
    return "; ".join(f"{side} is {_either(k)}" for side, k in known.items())


def _either(kinds: Sequence[str]) -> str:
    *others, last = map(repr, kinds)
    return f"{', '.join(others)} or {last}" if others else last


def _bare(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
