"""The embedded world: captioned scenes of coloured shapes, and a small text-to-image model of them.

It contains the renderer, the captions of GenEval's six tasks, a verifier that scores generated images,
rewards and metrics that use it, the architecture of the model, and the model itself in ``model/``.
Everything that flowgrpo does can be tried on it on a CPU, without downloads.
"""
