"""A run: its setup (``setup``), the loop (``loop``), and how it ends (``ending``).

``inputs`` checks a configuration and the files and names in it before torch is imported.
``replay`` turns recorded actions into the inputs of a loss, ``learner`` turns the loss into new
weights, ``evaluator`` decides when to evaluate on held-out prompts, ``session`` owns the processes,
logs and checkpoints of the run directory, ``metrics`` reduces an iteration to numbers, and ``console``
shows them.
"""
