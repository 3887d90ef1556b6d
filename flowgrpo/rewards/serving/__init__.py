"""Reward models behind HTTP: the wire format, the server (``flowgrpo serve-reward``) and the client.

``protocol`` and ``client`` are used by both ends and import only ``flowgrpo.data``, so that
``reward_models.remote`` and other rewards can use them; ``server`` and ``batching`` call the
reward.
"""
