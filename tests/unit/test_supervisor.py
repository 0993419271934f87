"""Who takes the next connection. All else about workers needs processes: tests/acceptance/test_workers.py."""

from daemon.supervisor import Shares


def test_the_next_connection_is_for_whoever_has_fewest() -> None:
    shares = Shares(2)
    assert shares.should_accept(0, 5)
    assert shares.should_accept(1, 4)
    assert not shares.should_accept(0, 5)
    assert shares.should_accept(0, 4)


def test_nobody_waits_for_a_worker_that_accepts_nothing() -> None:
    shares = Shares(3)
    assert shares.should_accept(1, 1000)
    shares.should_accept(2, 3)
    assert not shares.should_accept(1, 1000)
    shares.leave(2)
    assert shares.should_accept(1, 1000)
