"""The readiness of this daemon, collected from its parts."""

import time
from collections.abc import Callable, Iterable
from typing import Final

Check = Callable[[], Iterable[str]]
"""Returns one line for each problem."""

REPEAT_DELAY: Final = 600.0  # seconds until a failure that lasts is logged again
REFUSAL_DELAY: Final = 10.0  # seconds until a refusal is logged again
RECENT: Final = 30.0  # seconds for which a refusal is a warning


class Readiness:
    """The readiness for /readyz and the watchdog: the reasons of all checks, in order.

    `warnings` are checks whose problems an operator should know, but that do not make this daemon unready.
    """

    def __init__(self, *checks: Check, warnings: Iterable[Check] = ()) -> None:
        self._checks = checks
        self._warnings = tuple(warnings)

    def reasons(self) -> list[str]:
        """The reasons why this daemon is not ready; empty if it is."""
        return [reason for check in self._checks for reason in check()]

    def warnings(self) -> list[str]:
        """The problems that do not make this daemon unready."""
        return [warning for check in self._warnings for warning in check()]


class Refusals:
    """Clients that were refused because the database did not answer. It may answer others, so this is a warning."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reason = ""
        self._refused_at = self._logged_at = float("-inf")
        self._unlogged = 0

    def add(self, reason: str) -> int | None:
        """One was refused. If that is to be logged, how many have been since the last time; they come in crowds."""
        self._reason, self._refused_at = reason, self._clock()
        self._unlogged += 1
        if self._refused_at - self._logged_at < REFUSAL_DELAY:
            return None
        count, self._unlogged, self._logged_at = self._unlogged, 0, self._refused_at
        return count

    def warnings(self) -> list[str]:
        """What keeps clients from being served, if some were refused just now."""
        if self._clock() - self._refused_at > RECENT:
            return []
        return [f"clients were refused, because the database did not answer their questions: {self._reason}"]


class Progress:
    """How long some work has been due without getting anywhere, why, and when to log that."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failure = ""  # why the last attempt failed; empty after a success
        self._clock = clock
        self._due_since: float | None = None
        self._logged_at = float("-inf")

    @property
    def age(self) -> float:
        """Seconds since the work became due, or last got anywhere; 0 if none is due."""
        return 0.0 if self._due_since is None else self._clock() - self._due_since

    def begin(self) -> None:
        """The work is due."""
        if self._due_since is None:
            self._due_since = self._clock()

    def advance(self) -> None:
        """A part of the work is done, and more is due."""
        self._due_since = self._clock()
        self.failure = ""

    def end(self) -> None:
        """The work is done, or no longer due."""
        self._due_since = None
        self.failure = ""

    def fail(self, reason: str) -> bool:
        """An attempt failed. True if that is to be logged: the first time, for a new reason, and now and then."""
        self.begin()
        now = self._clock()
        is_news = reason != self.failure or now - self._logged_at >= REPEAT_DELAY
        self.failure = reason
        if is_news:
            self._logged_at = now
        return is_news
