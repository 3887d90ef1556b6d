"""What an update minimises, one loss per file: policies' outputs for a batch of actions in, one loss per action and metrics out.

``base`` holds the protocol between the learner and a loss. A loss is a frozen dataclass that is also
its configuration, and imports nothing but :mod:`flowgrpo.core`.
"""
