"""A run: the loop, its setup, the learner, checkpoints, metrics, and what a person sees on the console."""
