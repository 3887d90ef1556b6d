"""Algorithms: which actions and candidates to collect, and which candidates judge which actions.

One paper, one file: a frozen dataclass that is also the algorithm's configuration. The shared parts
follow the data: an algorithm (``base``) samples with a plan for whole ``trajectories`` or for
``branches`` from a shared path; a ``collection`` records actions and candidates as an experience;
``credit`` turns its scores into one advantage per action."""

from flowgrpo.algorithms.base import Algorithm, AlgorithmBase
from flowgrpo.algorithms.branch_grpo import BranchGRPO
from flowgrpo.algorithms.dance_grpo import DanceGRPO
from flowgrpo.algorithms.diffusion_nft import DiffusionNFT
from flowgrpo.algorithms.distillation import Distillation
from flowgrpo.algorithms.dmd import DMD
from flowgrpo.algorithms.draft import DRaFT
from flowgrpo.algorithms.find import FIND
from flowgrpo.algorithms.flow_grpo import FlowGRPO
from flowgrpo.algorithms.g2rpo import G2RPO
from flowgrpo.algorithms.matching import Matching
from flowgrpo.algorithms.mix_grpo import MixGRPO
from flowgrpo.algorithms.neighbor_grpo import NeighborGRPO
from flowgrpo.algorithms.offline import Pairs, Pictures
from flowgrpo.algorithms.pref_grpo import PrefGRPO
from flowgrpo.algorithms.refl import ReFL
from flowgrpo.algorithms.rtdmd import RTDMD
from flowgrpo.algorithms.self_opd import SelfOPD
from flowgrpo.algorithms.srpo import SRPO
from flowgrpo.algorithms.tempflow_grpo import TempFlowGRPO
from flowgrpo.algorithms.tp_grpo import TPGRPO
from flowgrpo.algorithms.vgpo import VGPO

__all__ = [
    "DMD", "FIND", "G2RPO", "RTDMD", "SRPO", "TPGRPO", "VGPO", "Algorithm", "AlgorithmBase", "BranchGRPO", "DRaFT",
    "DanceGRPO", "DiffusionNFT", "Distillation", "FlowGRPO", "Matching", "MixGRPO", "NeighborGRPO",
    "Pairs", "Pictures", "PrefGRPO", "ReFL", "SelfOPD", "TempFlowGRPO",
]  # fmt: skip
