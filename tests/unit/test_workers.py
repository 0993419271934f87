"""Who takes the next connection. All else about workers needs processes: tests/acceptance/test_workers.py."""

from daemon.workers import Shares


def test_the_next_connection_is_for_whoever_has_fewest() -> None:
    shares = Shares(2)
    assert shares.my_turn(0, 5)
    assert shares.my_turn(1, 4)
    assert not shares.my_turn(0, 5)
    assert shares.my_turn(0, 4)


def test_nobody_waits_for_a_worker_that_accepts_nothing() -> None:
    shares = Shares(3)
    assert shares.my_turn(1, 1000)
    shares.my_turn(2, 3)
    assert not shares.my_turn(1, 1000)
    shares.leave(2)
    assert shares.my_turn(1, 1000)
