"""Rewards: settings, the protocols a reward fulfils, loading by name, and the reward scorer of the loop.

``settings`` holds what a configuration says about a reward and computes the weighted sum;
``loading`` finds and constructs reward models; ``scorer`` runs them in the background with retries;
``pairs`` computes win rates from pairwise judges; ``frames`` applies an image reward to videos;
``serving`` holds the reward server, its client and their wire format. The reward models that ship
with flowgrpo are the separate package ``reward_models``: this package finds them by import path and
never imports them itself. Importing it loads neither torch nor a reward model.
"""
