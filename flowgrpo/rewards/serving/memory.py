"""The memory that all requests in progress may take together."""

import threading
from types import TracebackType

from flowgrpo.rewards.serving.batching import Overloaded


class Reserve:
    """Bytes that requests in progress have reserved.

    Each request takes its part in a :class:`Share`, which gives it back at the end.

    Attributes:
        limit: Bytes that all requests may take together.
        taken: Bytes that are taken now.
    """

    def __init__(self, limit: int):
        self.limit, self.taken = limit, 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int, own: int = 0) -> None:
        """Reserve bytes. A single request may exceed the limit: it has limits of its own.

        Args:
            num_bytes: How many.
            own: Bytes that the request has taken before.

        Raises:
            Overloaded: If there is not enough left; the client should try again.
        """
        with self._lock:
            if self.taken > own and self.taken + num_bytes > self.limit:
                raise Overloaded(
                    f"the requests in progress take {self.taken} of {self.limit} bytes, and this one "
                    f"needs {num_bytes} more"
                )
            self.taken += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Free bytes that were taken."""
        with self._lock:
            self.taken -= num_bytes


class Share:
    """What one request has reserved; as a context manager it is given back at the end."""

    def __init__(self, reserve: Reserve):
        self._reserve, self._taken = reserve, 0

    def take(self, num_bytes: int) -> None:
        """Reserve more bytes. Raises Overloaded as :meth:`Reserve.take`."""
        self._reserve.take(num_bytes, self._taken)
        self._taken += num_bytes

    def __enter__(self) -> "Share":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reserve.give_back(self._taken)
        self._taken = 0
