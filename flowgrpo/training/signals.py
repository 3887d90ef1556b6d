"""Signals: save and stop, save and continue, and the exit status of a run that was stopped."""

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

AGAIN = 75
"""Exit status that asks to run the same command again, which schedulers can be told to do: EX_TEMPFAIL of
sysexits.h."""
EXIT_STATUS: Mapping[str, int] = {"SIGINT": 130, "SIGTERM": AGAIN, "SIGHUP": AGAIN}
"""Exit status of a run that a signal stopped."""
HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class StopRequested(BaseException):
    """The run was asked to stop, and nothing that is computed now will be used.

    Like KeyboardInterrupt it is no error, and ``except Exception`` does not catch it.
    """


class Signals:
    """Receives the signals of a run's process.

    SIGTERM and SIGHUP stop the run as soon as its state is consistent: while it loads at once, during
    a rollout or an evaluation at the next batch or wait for a score (the weights are those of the last
    iteration), during an update at the end of the iteration. Ctrl-C (SIGINT) finishes the iteration,
    except under a launcher, which kills its processes soon after; a second Ctrl-C raises
    KeyboardInterrupt. SIGUSR1 saves at the end of the iteration, and the run continues.

    Attributes:
        stopping: The name of the signal that asked to stop; empty if none did.
        saving: Whether a checkpoint was asked for.
        loading: Whether there is no state to save yet; set to False when training starts.
    """

    def __init__(self, say: Callable[[str], None], is_main: bool = True, is_launched: bool = False):
        """Receive signals from now on, if this is the main thread; in other threads Python cannot.

        Args:
            say: Prints a line.
            is_main: Whether this process saves. Other processes stop early only while loading.
            is_launched: Whether there are several processes.
        """
        self.say, self.is_main, self.is_launched = say, is_main, is_launched
        self.stopping, self.saving, self.loading = "", False, True
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in HANDLED:
                number = getattr(signal, name, None)  # Windows has no SIGHUP and SIGUSR1.
                # A signal that the parent ignores, as nohup does with SIGHUP, stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def check(self) -> None:
        """A safe point: nothing that is computed here is needed if the run stops.

        Raises:
            StopRequested: If a signal asked to stop without finishing the iteration.
        """
        urgent = self.stopping and (self.stopping != "SIGINT" or self.is_launched)
        if urgent and self.is_main:
            raise StopRequested(self.stopping)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.saving = True
            self.say("SIGUSR1: saving after this iteration")
            return
        if self.stopping and name == "SIGINT":
            raise KeyboardInterrupt
        self.stopping = name
        if self.loading:
            raise StopRequested(name)
        if name == "SIGINT":
            self.say("stopping after this iteration (Ctrl-C again stops at once)")
        else:
            self.say(f"{name}: saving and stopping")
