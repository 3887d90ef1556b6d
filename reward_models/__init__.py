"""Reward models: one file, one reward, usable without flowgrpo's trainer."""
