"""A run: its setup (``setup``), the loop (``loop``), and how it ends (``ending``).

``learner`` turns experience into new weights, ``evaluator`` decides when to evaluate on held-out
prompts, ``session`` owns the processes, logs and checkpoints of the run directory, ``metrics`` reduces
an iteration to numbers, and ``console`` shows them.
"""
