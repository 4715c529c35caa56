"""Stopping a run politely: the first signal asks, the second one insists."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Interrupted", "stop_signals"]


class Interrupted(Exception):
    """A run was stopped by a signal, after its state had been saved."""

    def __init__(self, signum: int, step: int, path: Path):
        super().__init__(
            f"stopped after step {step}; the state is saved in {path}, from where the run can be resumed"
        )
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list it yields; a second one acts as it would have without this.

    Signals can only be handled in the main thread; elsewhere the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        restore()
        print("\nstopping after this step and saving; once more to stop at once", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        restore()
