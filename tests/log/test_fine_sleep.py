"""Pauses of less than a millisecond."""

import asyncio
import time
from pathlib import Path

import pytest

from daemon.log.fine_sleep import fine_sleep


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_short_pause_ends_neither_early_nor_a_whole_millisecond_late() -> None:
    pauses = []
    with fine_sleep() as pause:
        for _ in range(50):
            began = time.monotonic()
            await pause(0.0003)
            pauses.append(time.monotonic() - began)
    assert 0.0003 <= min(pauses) < 0.001


async def test_a_pause_that_was_cancelled_does_not_shorten_the_next_one() -> None:
    with fine_sleep() as pause:
        task = asyncio.ensure_future(pause(0.0001))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        began = time.monotonic()
        await pause(0.02)
        assert time.monotonic() - began >= 0.02


async def test_a_sleep_of_no_time_still_ends_and_leaves_no_open_file() -> None:
    before = open_files()
    for _ in range(3):
        with fine_sleep() as pause:
            await pause(0)
    assert before == open_files()


async def test_without_such_a_timer_asyncio_sleeps_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with fine_sleep() as pause:
        assert asyncio.sleep == pause
