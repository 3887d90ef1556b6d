"""Reward models: one file, one reward, usable without flowgrpo's trainer.

The short name of a reward is its file's name, and its class is the first name in ``__all__``. Parts that
several rewards share are in ``shared``. From flowgrpo they import only its types, pictures, rubrics,
GenEval's scoring rule, and the client of reward servers with its wire format.
"""
