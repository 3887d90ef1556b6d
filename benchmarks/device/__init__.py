"""Measures on a device what a CPU cannot show: ``python -m benchmarks.device``."""
