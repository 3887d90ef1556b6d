"""Evaluates models and presents the results of a run.

Held-out scores and metrics, comparison grids of a base model and a trained model, inspection of the credit that
an algorithm assigns to each denoising step, the HTML report and the model card.
"""
