"""The upper bounds of backoff delays."""

import random

import pytest

from daemon.postgres.backoff import INITIAL_DELAY, MAX_DELAY, backoff_delay


@pytest.fixture(autouse=True)
def upper_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every delay is as long as it can be."""
    monkeypatch.setattr(random, "uniform", lambda _, bound: bound)


def test_the_bound_doubles_with_each_attempt() -> None:
    assert [INITIAL_DELAY, INITIAL_DELAY * 2, INITIAL_DELAY * 4] == [backoff_delay(attempt) for attempt in range(3)]
    assert [0.5, 1.0, 2.0] == [backoff_delay(attempt, initial=0.5) for attempt in range(3)]


@pytest.mark.parametrize("attempt", [8, 32, 33, 1024, 10_000, 10**6, 10**400])
def test_the_bound_is_capped_for_any_attempt(attempt: int) -> None:
    assert MAX_DELAY == backoff_delay(attempt)
    assert 5.0 == backoff_delay(attempt, maximum=5.0)


def test_a_delay_lies_between_zero_and_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert all(0 <= backoff_delay(3) <= INITIAL_DELAY * 8 for _ in range(100))
