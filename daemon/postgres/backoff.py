"""Capped exponential backoff with full jitter."""

import random
from typing import Final

INITIAL_DELAY: Final = 0.2
"""Seconds: the upper bound of the first delay."""

MAX_DELAY: Final = 30.0
"""Seconds: the upper bound of every delay."""


def backoff_delay(attempt: int, *, initial: float = INITIAL_DELAY, maximum: float = MAX_DELAY) -> float:
    """A random number of seconds between 0 and the bound for `attempt`, which counts from 0.

    The bound doubles with each attempt. The jitter keeps a fleet of daemons from reconnecting all at once; see
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """
    bound = min(maximum, initial * 2.0 ** min(attempt, 32))
    return random.uniform(0, bound)  # noqa: S311
