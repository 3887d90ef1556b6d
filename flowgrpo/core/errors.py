"""Errors that several packages raise."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key and how to correct it."""


class LostRankError(RuntimeError):
    """Another process of the run has ended or does not answer. The same command resumes the run."""


class DivergenceError(RuntimeError):
    """Training has destroyed the policy. The message says what shows it."""
