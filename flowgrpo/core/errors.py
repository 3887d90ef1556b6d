"""Errors that several packages raise."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key and how to correct it."""
