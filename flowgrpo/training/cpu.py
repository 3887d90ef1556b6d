"""Settings that make torch fast on CPUs."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30


def prepare_cpu(threads: int) -> None:
    """Set the number of threads, and keep freed memory for the next step.

    By default glibc gives every large tensor back to the system when it is freed, and the next step
    pays for it with page faults: up to half of the time of a small model.

    Args:
        threads: For torch; 0 leaves its own choice, one per core.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, LARGE)
            libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE - 1)
