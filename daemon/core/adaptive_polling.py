"""When the leader polls for events, and when it sleeps until a writer notifies it.

A notification costs each writer a NOTIFY, and NOTIFY keeps writers from sharing a flush. Polling costs the leader and
Postgres one statement each time. So the leader polls while much is written, and sleeps while little is.

An advisory lock keeps a wake-up from being lost. Writers share it, and the leader holds it exclusively while it
sleeps; a writer that cannot share it notifies. The leader requests the lock while it still polls: from then on new
writers notify, and once the lock is granted, the last writer that did not notify has ended. The grant counts as a
notification: the leader polls once more, and then may sleep. Correctness never depends on time; times only decide
what is cheaper.
"""

from enum import StrEnum
from math import exp
from typing import Final

BUSY_RATE: Final = 300.0  # transactions a second from which on polling is cheaper than notifications
CALM_RATE: Final = 100.0  # transactions a second below which notifications are cheaper
RATE_WINDOW: Final = 0.1  # seconds over which the rate is averaged
DELAY_PER_POLL: Final = 0.5  # of the time that a poll took, until the next one: a busy machine is polled less ...
MIN_WRITTEN: Final = 0.25  # transactions expected during the delay, at least: most polls find something ...
MAX_POLL_DELAY: Final = 0.005  # seconds of delay, at most
LOCK_WAIT_DELAY: Final = 0.05  # seconds between two polls while the lock waits for a long writer


class State(StrEnum):
    """What the leader does."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"


class AdaptivePoller:
    """Decides from what each poll found. It starts awake. Times are in seconds, on any clock that only goes forward.

    Call `record_poll` after each poll, then follow `wants_sleep_lock` and `delay`.
    """

    def __init__(self, now: float, *, max_sleep: float) -> None:
        """After `max_sleep` seconds it polls even without a notification."""
        self.state = State.AWAKE
        self._max_sleep = max_sleep
        self._polled_at = now
        self._rate = BUSY_RATE
        self._took = 0.0

    @property
    def wants_sleep_lock(self) -> bool:
        """Whether to hold or request the lock."""
        return self.state is not State.AWAKE

    @property
    def delay(self) -> float:
        """Seconds until the next poll, unless a notification arrives first."""
        match self.state:
            case State.ASLEEP:
                return self._max_sleep
            case State.FALLING_ASLEEP:
                return LOCK_WAIT_DELAY
            case State.AWAKE:
                return min(max(MIN_WRITTEN / self._rate, DELAY_PER_POLL * self._took), MAX_POLL_DELAY)

    def record_poll(self, now: float, found: int, took: float, *, held: bool) -> None:
        """A poll found that many transactions and took that many seconds. `held`: whether the lock is held."""
        rate = self._rate * exp((self._polled_at - now) / RATE_WINDOW) + found / RATE_WINDOW
        self._rate = min(rate, 2 * BUSY_RATE)
        self._polled_at = now
        self._took = took
        if rate >= BUSY_RATE:
            self.state = State.AWAKE
        elif self.state is not State.AWAKE or rate < CALM_RATE:
            self.state = State.ASLEEP if held else State.FALLING_ASLEEP
