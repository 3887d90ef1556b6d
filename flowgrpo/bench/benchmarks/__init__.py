"""The benchmarks that come with flowgrpo: one file each, its class first in ``__all__``."""
