"""Wall time, kernel time, gaps, memory and floating-point operations of a function on a device."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

GB = 2**30
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.2}
"""Dense bf16 tensor-core TFLOP/s by part of a device's name, from NVIDIA's data sheets."""

Number = int | float | None
Interval = tuple[float, float, str]
"""Start and end in microseconds, and a name."""


def synchronize() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
    """Mean wall time of a call, after ``warm`` calls that are not counted."""
    for _ in range(warm):
        run()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - began) / repeats


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Most bytes allocated during a call, beyond those before it; None without a GPU."""
    if not torch.cuda.is_available():
        run()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_gb(number: int | None) -> float | None:
    """Bytes in GB, to two digits."""
    return None if number is None else round(number / GB, 2)


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def utilisation(operations: float, duration: float) -> float | None:
    """The share of the device's peak rate; None if that is unknown."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    return None if peak is None else round(operations / duration / (peak * 1e12), 3)


def gaps(intervals: Sequence[Interval], number: int = 5) -> tuple[float, list[dict[str, Any]]]:
    """The time during which something runs, and the longest times between two intervals.

    Args:
        intervals: May overlap.
        number: Number of gaps to return.

    Returns:
        Milliseconds during which at least one interval runs; and of the longest gaps their milliseconds
        and the names of the intervals before and after them.
    """
    busy, found = 0.0, []
    end, before = None, ""
    for begin, stop, name in sorted(intervals):
        if end is not None and begin > end:
            gap = round((begin - end) / 1e3, 3)
            found.append({"ms": gap, "after": before[:60], "before": name[:60]})
        busy += max(0.0, stop - (begin if end is None else max(begin, end)))
        if end is None or stop > end:
            end, before = stop, name
    found.sort(key=lambda g: -float(g["ms"]))
    return busy / 1e3, found[:number]


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Wall and kernel milliseconds of a call, the idle share, and the largest gaps between kernels.

    Without a GPU the operators of the CPU take the place of kernels, so that the code runs; their idle
    share says nothing about a device.
    """
    run()
    synchronize()
    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, acc_events=True) as found:
        began = time.perf_counter()
        run()
        synchronize()
        wall = 1e3 * (time.perf_counter() - began)
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    intervals = [
        (float(e.time_range.start), float(e.time_range.end), str(e.name))
        for e in found.events() or []
        if e.device_type == device and (on_gpu or e.cpu_parent is None)
    ]
    busy, largest = gaps(intervals)
    return {
        "wall_ms": round(wall, 2),
        "kernel_ms": round(busy, 2),
        "idle_share": round(max(0.0, 1 - busy / wall), 3),
        "kernels": len(intervals),
        "largest_gaps": largest,
    }
