"""What has been published lately: recorded while somebody looks at the console, and not otherwise."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from daemon.core.change import Change, Topic

MAX_EVENTS: Final = 300  # changes that are kept
HISTORY: Final = 180  # seconds that the charts show
MAX_TIMED: Final = 100  # changes of one batch that are timed and kept; of a larger batch, the last


@dataclass(slots=True)
class Second:
    """What was published in one second. `at` is in seconds since 1970, latencies are in milliseconds."""

    at: int
    changes: int = 0
    frames: int = 0
    latencies: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, int | None]:
        """For the charts: latencies are null if nothing was timed."""
        ordered = sorted(self.latencies)
        median = ordered[len(ordered) // 2] if ordered else None
        longest = ordered[-1] if ordered else None
        return {"at": self.at, "changes": self.changes, "frames": self.frames, "median": median, "longest": longest}


class Recorder:
    """The newest changes without their content, and the numbers of each second. `clock` is in seconds since 1970."""

    def __init__(self, count_followers: Callable[[Topic], int], clock: Callable[[], float] = time.time) -> None:
        self._count_followers = count_followers
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._seconds: deque[Second] = deque(maxlen=HISTORY)

    def begin(self, recent: Iterable[Change]) -> None:
        """Forget everything, and begin with changes that were published before."""
        self._events.clear()
        self._seconds.clear()
        self._events.extend(_event(change) for change in recent)

    def record(self, changes: Sequence[Change], frames: int) -> None:
        """Changes have just been published, in `frames` frames to clients."""
        now = self._clock()
        if not self._seconds or self._seconds[-1].at != int(now):
            self._seconds.append(Second(int(now)))
        second = self._seconds[-1]
        second.changes += len(changes)
        second.frames += frames
        for change in changes[-MAX_TIMED:]:
            # Both clocks are of the machines' time of day: the difference may be off, and even negative.
            latency = max(0, round(1000 * (now - datetime.fromisoformat(change.at).timestamp())))
            second.latencies.append(latency)
            event = _event(change)
            event["latency"] = latency
            event["followers"] = self._count_followers(change.topic)
            self._events.append(event)

    def events(self, after: int) -> list[dict[str, Any]]:
        """The changes past this number."""
        return [event for event in self._events if event["seq"] > after]

    def seconds(self, since: int) -> list[dict[str, int | None]]:
        """The numbers from this second on."""
        return [second.summary() for second in self._seconds if second.at >= since]


def _event(change: Change) -> dict[str, Any]:
    """What the console shows of a change: which row, and never what is in it."""
    return {
        "seq": change.seq,
        "at": change.at,
        "topic": change.topic,
        "table": change.table,
        "kind": change.kind.value,
        "key": change.key,
        "changed": list(change.changed),
    }
