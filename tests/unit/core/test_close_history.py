from daemon.core.close_codes import Close
from daemon.core.close_history import CloseHistory

TOO_SLOW = Close(4408, "too_slow")


def test_a_returning_client_learns_why_its_connection_was_closed() -> None:
    close_history = CloseHistory()
    close_history.record("one", "ada", TOO_SLOW)
    assert TOO_SLOW == close_history.lookup("one", "ada")
    assert close_history.lookup("another", "ada") is None


def test_a_client_learns_nothing_about_another_users_connection() -> None:
    close_history = CloseHistory()
    close_history.record("one", "ada", TOO_SLOW)
    assert close_history.lookup("one", "bob") is None
    assert close_history.lookup("one", "") is None


def test_the_oldest_entries_are_dropped_first() -> None:
    close_history = CloseHistory(limit=2)
    for session in ("one", "two", "three"):
        close_history.record(session, "ada", TOO_SLOW)
    assert [None, TOO_SLOW, TOO_SLOW] == [close_history.lookup(session, "ada") for session in ("one", "two", "three")]
