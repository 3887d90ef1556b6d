"""Losses, one per file: from policies' outputs for a batch of actions to one loss per action and metrics.

``base`` holds the protocol between the learner and a loss. A loss is a frozen dataclass that is also
its configuration, and imports nothing but :mod:`flowgrpo.core`.
"""
