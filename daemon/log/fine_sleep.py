"""Pauses of less than a millisecond. On Linux asyncio waits in whole milliseconds, rounded up."""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC  # the same numbers as TFD_NONBLOCK and TFD_CLOEXEC


class _Times(ctypes.Structure):
    """`struct itimerspec`: an interval, and the time until the timer expires; each in seconds and nanoseconds."""

    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


@contextmanager
def fine_sleep() -> Iterator[Callable[[float], Awaitable[None]]]:
    """Gives one task a `sleep(seconds)` that ends some ten microseconds late; asyncio's own without such a timer."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        yield asyncio.sleep
        return
    libc = ctypes.CDLL(None, use_errno=True)
    timer = libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
    if timer < 0:
        yield asyncio.sleep
        return
    loop, expired = asyncio.get_running_loop(), asyncio.Event()

    def expire() -> None:
        with suppress(BlockingIOError):  # it was set again meanwhile
            os.read(timer, 8)
            expired.set()

    async def sleep(seconds: float) -> None:
        whole, nanoseconds = divmod(max(1, round(seconds * 1e9)), 1_000_000_000)
        expired.clear()
        libc.timerfd_settime(timer, 0, ctypes.byref(_Times((0, 0), (whole, nanoseconds))), None)
        await expired.wait()

    try:
        loop.add_reader(timer, expire)
        try:
            yield sleep
        finally:
            loop.remove_reader(timer)
    finally:
        os.close(timer)
