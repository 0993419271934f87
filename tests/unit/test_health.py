"""What /readyz and the log say of refusals."""

from daemon.health import RECENT, REFUSAL_DELAY, Refusals


def test_refusals_in_a_crowd_are_counted_and_logged_now_and_then() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    assert 1 == refusals.add("first")
    assert [None, None] == [refusals.add("second"), refusals.add("third")]
    now = REFUSAL_DELAY
    assert 3 == refusals.add("fourth")


def test_a_refusal_is_a_warning_until_it_is_long_ago() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    assert [] == refusals.warnings()
    refusals.add("no answer")
    now = RECENT
    [warning] = refusals.warnings()
    assert "no answer" in warning
    now = RECENT + 1
    assert [] == refusals.warnings()
