"""One paper, one file: what to collect, and which candidates judge which actions."""

from flowgrpo.algorithms.base import Algorithm
from flowgrpo.algorithms.dance_grpo import DanceGRPO
from flowgrpo.algorithms.flow_grpo import FlowGRPO

__all__ = ["Algorithm", "DanceGRPO", "FlowGRPO"]
