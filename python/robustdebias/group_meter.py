"""Mean losses of the groups over many batches, without waiting for the device at each."""

from __future__ import annotations

from typing import Any

__all__ = ["GroupMeter"]

_UNREAD = 64  # calls whose statistics are left on the device: each is some small tensors


class GroupMeter:
    """``add(call)`` for each batch, then ``read()``; a call is what has the ``report()`` of a batch."""

    def __init__(self) -> None:
        self._unread: list[Any] = []
        self._rows: dict[str | None, tuple[float, int]] = {}  # sum of losses, count; under None of all rows

    def add(self, call: Any) -> None:
        self._unread.append(call)
        if len(self._unread) >= _UNREAD:
            self._fetch()

    def read(self) -> tuple[float | None, dict[str, float]]:
        """Mean loss of all rows since the last ``read`` (None if there were none), and of each group that had any."""
        self._fetch()
        rows, self._rows = self._rows, {}
        means = {name: loss / count for name, (loss, count) in rows.items()}
        overall = means.pop(None, None)
        return overall, {name: mean for name, mean in means.items() if name is not None}

    def _fetch(self) -> None:
        for call in self._unread:
            report = call.report()
            for name, stats in [(None, report.overall), *report.by_group.items()]:
                if stats.count:
                    loss, count = self._rows.get(name, (0.0, 0))
                    self._rows[name] = loss + stats.loss * stats.count, count + stats.count
        self._unread = []
