"""One paper, one file: what to collect, and which candidates judge which actions."""

from flowgrpo.algorithms.base import Algorithm
from flowgrpo.algorithms.branch_grpo import BranchGRPO
from flowgrpo.algorithms.dance_grpo import DanceGRPO
from flowgrpo.algorithms.diffusion_nft import DiffusionNFT
from flowgrpo.algorithms.find import FIND
from flowgrpo.algorithms.flow_grpo import FlowGRPO
from flowgrpo.algorithms.g2rpo import G2RPO
from flowgrpo.algorithms.mix_grpo import MixGRPO
from flowgrpo.algorithms.pref_grpo import PrefGRPO
from flowgrpo.algorithms.tempflow_grpo import TempFlowGRPO
from flowgrpo.algorithms.tp_grpo import TPGRPO
from flowgrpo.algorithms.vgpo import VGPO

__all__ = [
    "FIND", "G2RPO", "TPGRPO", "VGPO", "Algorithm", "BranchGRPO", "DanceGRPO", "DiffusionNFT",
    "FlowGRPO", "MixGRPO", "PrefGRPO", "TempFlowGRPO",
]  # fmt: skip
