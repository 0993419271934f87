"""Which worker accepts the next connection. Everything else needs processes: tests/acceptance/test_workers.py."""

from daemon.supervisor import ConnectionCounts


def test_the_worker_with_the_fewest_connections_accepts_the_next_one() -> None:
    counts = ConnectionCounts(2)
    assert counts.should_accept(0, 5)
    assert counts.should_accept(1, 4)
    assert not counts.should_accept(0, 5)
    assert counts.should_accept(0, 4)


def test_a_worker_that_accepts_nothing_is_not_waited_for() -> None:
    counts = ConnectionCounts(3)
    assert counts.should_accept(1, 1000)
    counts.should_accept(2, 3)
    assert not counts.should_accept(1, 1000)
    counts.remove(2)
    assert counts.should_accept(1, 1000)
