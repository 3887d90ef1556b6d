"""Errors that several rooms raise."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and how to correct it."""
