"""A CUDA stream for the reward models, so that their kernels do not queue behind the denoiser's."""

from collections.abc import Callable
from typing import Any

from flowgrpo.core.tensors import torch


class OwnStream:
    """Runs work on a CUDA stream of its own.

    The kernels of one stream run in the order in which they were launched. On the default stream a reward
    model waits for all of the denoiser's kernels that were launched before it, and the scores, which are
    read at the end of the work, for those that were launched in the meantime.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Any] = {}

    def doing(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Work that runs on the stream of the calling thread's device.

        Its kernels begin after those that the calling thread has launched so far, such as the loading of a
        reward model, and have finished when it returns. Without CUDA, or before the run has used it, the
        work is returned as it is.

        Args:
            work: Called by another thread.
        """
        if not torch.cuda.is_initialized():
            return work
        device = torch.cuda.current_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        launched = torch.cuda.current_stream().record_event()

        def run() -> Any:
            with torch.cuda.stream(stream):
                stream.wait_event(launched)
                try:
                    return work()
                finally:
                    stream.synchronize()

        return run
