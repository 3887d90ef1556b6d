"""Settings that make torch fast on CPUs."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30


def prepare_cpu(threads: int) -> None:
    """Set the number of threads, and make glibc keep freed memory for the next step.

    By default glibc returns the memory of every large tensor to the system when it is freed, and the
    next step spends time on page faults: up to half of the time of a small model. Where there is a CUDA
    device, tensors in main memory are few and large, and the default is left as it is.

    Args:
        threads: Number of torch threads; 0 keeps torch's default, one per core.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, LARGE)
            libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE - 1)
