"""When the leader is asleep and must be rung for, and when it is awake and looks for events by itself.

To be rung for costs each writer a NOTIFY, and all of them their common flush; to look costs the leader and Postgres a
statement each time. So it sleeps while little is written, and stays awake while much is.

What keeps a wake-up from being lost is a lock, which writers share and the leader holds alone while it is asleep:
whoever cannot share it rings. The leader asks for it while it is still awake. From then on new writers ring, and when
it is granted the last writer has ended who did not: that counts as a ring, and after one more look the leader may
sleep. No clock has a part in this: times here only say when it pays.
"""

from enum import StrEnum
from math import exp
from typing import Final

BUSY_RATE: Final = 300.0  # transactions a second: from here on it costs more to be rung for than to look
CALM_RATE: Final = 100.0  # and below this less
RATE_WINDOW: Final = 0.1  # seconds over which that is averaged
POLL_DELAY: Final = 0.002  # seconds from one look to the next; where one takes longer, so much more may gather ...
MAX_POLL_DELAY: Final = 0.005  # ... but for no longer than this
LOCK_WAIT_DELAY: Final = 0.05  # seconds between two looks while a writer who did not ring goes on for long


class State(StrEnum):
    """What the leader does."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"


class AdaptivePoller:
    """Decides from what each look found. It begins awake. Times are in seconds on any clock that goes forward.

    Call `looked` after each look, then follow `wants_lock` and `pause`.
    """

    def __init__(self, now: float, *, max_sleep: float) -> None:
        """`longest_sleep`: after so long it looks though nobody rang."""
        self.state = State.AWAKE
        self._max_sleep = max_sleep
        self._polled_at = now
        self._rate = BUSY_RATE
        self._took = 0.0

    @property
    def wants_sleep_lock(self) -> bool:
        """Should the lock be held, or asked for?"""
        return self.state is not State.AWAKE

    @property
    def delay(self) -> float:
        """Seconds until the next look, if nobody rings before."""
        match self.state:
            case State.ASLEEP:
                return self._max_sleep
            case State.FALLING_ASLEEP:
                return LOCK_WAIT_DELAY
            case State.AWAKE:
                return min(abs(POLL_DELAY - self._took), MAX_POLL_DELAY)

    def record_poll(self, now: float, found: int, took: float, *, held: bool) -> None:
        """A look has found so many transactions, and took so many seconds. `held`: is the lock held?"""
        rate = self._rate * exp((self._polled_at - now) / RATE_WINDOW) + found / RATE_WINDOW
        self._rate = min(rate, 2 * BUSY_RATE)
        self._polled_at = now
        self._took = took
        if rate >= BUSY_RATE:
            self.state = State.AWAKE
        elif self.state is not State.AWAKE or rate < CALM_RATE:
            self.state = State.ASLEEP if held else State.FALLING_ASLEEP
