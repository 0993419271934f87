"""Pauses of less than a millisecond. On Linux asyncio waits in whole milliseconds, rounded up."""

import asyncio
import ctypes
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC  # the same numbers as TFD_NONBLOCK and TFD_CLOEXEC


_ITIMERSPEC: Final = struct.Struct("4l")
"""An interval, and the time until the timer expires; each in seconds and nanoseconds."""


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
    loop, times = asyncio.get_running_loop(), ctypes.create_string_buffer(_ITIMERSPEC.size)
    waiter = loop.create_future()

    def expire() -> None:
        with suppress(BlockingIOError):  # it was set again meanwhile
            os.read(timer, 8)
            if not waiter.done():
                waiter.set_result(None)

    async def sleep(seconds: float) -> None:
        nonlocal waiter
        waiter = loop.create_future()
        _ITIMERSPEC.pack_into(times, 0, 0, 0, *divmod(max(1, round(seconds * 1e9)), 1_000_000_000))
        libc.timerfd_settime(timer, 0, times, None)
        await waiter

    try:
        loop.add_reader(timer, expire)
        try:
            yield sleep
        finally:
            loop.remove_reader(timer)
    finally:
        os.close(timer)
