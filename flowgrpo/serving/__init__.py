"""Reward models behind HTTP, each in an environment of its own: ``flowgrpo serve-reward``."""

from flowgrpo.serving.batching import Batcher, Overloaded
from flowgrpo.serving.server import RewardServer

__all__ = ["Batcher", "Overloaded", "RewardServer"]
