"""One paper, one file: what to collect, and which candidates judge which actions."""

from flowgrpo.algorithms.base import Algorithm
from flowgrpo.algorithms.dance_grpo import DanceGRPO
from flowgrpo.algorithms.flow_grpo import FlowGRPO
from flowgrpo.algorithms.g2rpo import G2RPO
from flowgrpo.algorithms.tempflow_grpo import TempFlowGRPO

__all__ = ["G2RPO", "Algorithm", "DanceGRPO", "FlowGRPO", "TempFlowGRPO"]
