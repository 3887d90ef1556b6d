"""Published methods by name: the settings that select each, and the recipe that has all of its settings.

The name of a method is not always a kind: AWM, for instance, is the algorithm ``matching`` with the
loss ``matching``. ``flowgrpo config explain NAME`` and the errors about unknown kinds look here.
"""

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
    """

    names: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""

    @property
    def words(self) -> str:
        """The settings and the recipe, in words."""
        text = f"{self.names[0]} is " + " with ".join(
            f"{k} = {_toml(v)}" for k, v in self.settings.items()
        )
        return text + (f"; all its settings: the recipe {self.recipe}" if self.recipe else "")


def _algorithm(kind: str, loss: str = "", **more: Any) -> dict[str, Any]:
    """The settings of a method; underscores between keys of tables are written ``__``."""
    settings = {"algorithm.kind": kind} | ({"loss.kind": loss} if loss else {})
    return settings | {k.replace("__", "."): v for k, v in more.items()}


METHODS = (
    Method(("Flow-GRPO",), _algorithm("flow_grpo"), "sd35_medium_pickscore"),
    Method(("Flow-GRPO-Fast",), _algorithm("flow_grpo", algorithm__steps__kind="random_window"), "sd35_medium_fast"),
    Method(("Flow-CPS", "CPS"), _algorithm("flow_grpo", algorithm__transition__kind="cps"), "flux_fast"),
    Method(("Flash-GRPO",), _algorithm("flow_grpo", algorithm__steps_per="group", loss__step_weight="rectified"), "wan21_t2v_flash"),
    Method(("GRPO-Guard",), _algorithm("flow_grpo", loss__ratio="guard"), "sd35_medium_guard"),
    Method(("Flow-DPPO", "DPPO"), _algorithm("flow_grpo", loss__clip="kl"), "sd35_medium_dppo"),
    Method(("GARDO",), _algorithm("flow_grpo", guard__kl="uncertain"), "sd35_medium_gardo"),
    Method(("Chunk-GRPO", "GCPO"), _algorithm("flow_grpo", loss__chunks=[2, 3, 4, 7]), "flux_chunk"),
    Method(("PaCo-RL", "PaCo-GRPO"), _algorithm("flow_grpo"), "flux_paco"),
    Method(("DanceGRPO",), _algorithm("dance_grpo"), "flux_dance"),
    Method(("MixGRPO",), _algorithm("mix_grpo"), "flux_mix"),
    Method(("Pref-GRPO",), _algorithm("pref_grpo"), "flux_pref"),
    Method(("GDPO",), {"algorithm.advantage.kind": "gdpo"}, "flux_pref"),
    Method(("BNPO",), {"algorithm.advantage.kind": "beta"}),
    Method(("NGRPO",), {"algorithm.advantage.kind": "virtual_best"}),
    Method(("TempFlow-GRPO",), _algorithm("tempflow_grpo"), "sd35_medium_tempflow"),
    Method(("G2RPO", "G²RPO", "Granular-GRPO"), _algorithm("g2rpo"), "flux_g2rpo"),
    Method(("TP-GRPO", "TurningPoint-GRPO"), _algorithm("tp_grpo"), "sd35_medium_tp"),
    Method(("DenseGRPO",), _algorithm("tp_grpo", algorithm__turning_points="none"), "sd35_medium_dense"),
    Method(("Stepwise-Flow-GRPO",), _algorithm("tp_grpo", algorithm__turning_points="none", algorithm__rivals="group")),
    Method(("VGPO",), _algorithm("vgpo"), "sd35_medium_vgpo"),
    Method(("BranchGRPO",), _algorithm("branch_grpo"), "flux_branch"),
    Method(("TreeGRPO",), _algorithm("branch_grpo", algorithm__rivals="leaves", algorithm__between="ode")),
    Method(("DiffusionNFT", "NFT"), _algorithm("diffusion_nft", "nft"), "sd35_medium_nft"),
    Method(("Sol-RL",), _algorithm("diffusion_nft", "nft", algorithm__previews__number=96), "sd35_large_sol"),
    Method(("AWM", "Advantage Weighted Matching"), _algorithm("matching", "matching"), "sd35_medium_awm"),
    Method(("V-GRPO", "EPG", "PEPG", "PAR"), _algorithm("matching", "matching")),
    Method(("RAFT", "rejection sampling"), _algorithm("matching", "matching", algorithm__advantage__kind="best"), "sd35_medium_raft"),
    Method(("DGPO",), _algorithm("matching", "dgpo"), "sd35_medium_dgpo"),
    Method(("CRD",), _algorithm("matching", "crd")),
    Method(("Diffusion-DPO", "DPO", "Flow-DPO"), _algorithm("pairs", "dpo"), "sd15_dpo"),
    Method(("Online DPO",), _algorithm("matching", "dpo")),
    Method(("Supervised fine-tuning", "SFT"), _algorithm("pictures", "supervised")),
    Method(("Neighbor GRPO",), _algorithm("neighbor_grpo", "neighbor"), "flux_neighbor"),
    Method(("FIND",), _algorithm("find"), "sd15_find"),
    Method(("DiffusionOPD", "Flow-OPD", "OPD", "on-policy distillation"), _algorithm("distillation", "distillation"), "sd35_medium_opd"),
    Method(("DMD", "DMD2"), _algorithm("dmd", "dmd"), "sd35_medium_dmd"),
    Method(("RTDMD",), _algorithm("rtdmd", "dmd"), "sd35_medium_rtdmd"),
    Method(("DRaFT", "DRaFT-K", "DRaFT-LV", "AlignProp"), _algorithm("draft", "reward_gradient"), "sd15_alignprop"),
    Method(("ReFL",), _algorithm("refl", "reward_gradient"), "sd14_refl"),
    Method(("SRPO",), _algorithm("srpo", "reward_gradient"), "flux_srpo"),
)  # fmt: skip
"""All methods that have a section in docs/algorithms.md."""


def method(name: str) -> Method | None:
    """The method of a name in any spelling, such as ``awm`` or ``flow_grpo_fast``; None if there is none."""
    return next((m for m in METHODS if _bare(name) in map(_bare, m.names)), None)


def advice(kind: str) -> str:
    """``"; AWM is ..."`` if an unknown kind is the name of a method, or nothing."""
    found = method(kind)
    return "" if found is None else f"; {found.words}"


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


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
