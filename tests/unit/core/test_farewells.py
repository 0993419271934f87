from daemon.core.close_codes import Close
from daemon.core.farewells import Farewells

TOO_SLOW = Close(4408, "too_slow")


def test_whoever_comes_back_learns_why_the_connection_was_ended() -> None:
    farewells = Farewells()
    farewells.keep("one", "ada", TOO_SLOW)
    assert TOO_SLOW == farewells.find("one", "ada")
    assert farewells.find("another", "ada") is None


def test_nobody_learns_of_the_connection_of_somebody_else() -> None:
    farewells = Farewells()
    farewells.keep("one", "ada", TOO_SLOW)
    assert farewells.find("one", "bob") is None
    assert farewells.find("one", "") is None


def test_the_oldest_farewells_are_forgotten_first() -> None:
    farewells = Farewells(most=2)
    for session in ("one", "two", "three"):
        farewells.keep(session, "ada", TOO_SLOW)
    assert [None, TOO_SLOW, TOO_SLOW] == [farewells.find(session, "ada") for session in ("one", "two", "three")]
