"""Reward models behind HTTP, each in an environment of its own: ``flowgrpo serve-reward``."""

from flowgrpo.rewards.serving.batching import Batcher, Overloaded
from flowgrpo.rewards.serving.server import RewardServer

__all__ = ["Batcher", "Overloaded", "RewardServer"]
