"""When jobs are due, and for which day a run is."""

from datetime import UTC, datetime, time, timedelta

from daemon.core.jobs import Job

DAY = timedelta(days=1)


def test_a_job_is_due_every_day_at_its_time_in_utc() -> None:
    one = Job("one", time(0, 10), "", statement="one", catch_up=3)
    due = datetime(2025, 3, 1, 0, 10, tzinfo=UTC)
    assert due == one.due_before(due) == one.due_before(due + DAY - timedelta(microseconds=1))
    assert due + DAY == one.due_after(due)
    assert due == one.due_after(due - timedelta(microseconds=1))
    assert "daily at 00:10 UTC" == one.schedule
    assert due == one.run_for(due, due)
    assert due == one.run_for(due, due + 2 * DAY)
    assert due + DAY == one.run_for(due, due + 3 * DAY)
    assert due == one.run_for(due + DAY, due + timedelta(hours=1))  # asked for before it is due
