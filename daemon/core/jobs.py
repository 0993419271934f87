"""Jobs: work that is due once a day, and for which day a run is."""

from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Final

DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Job:
    """Work that is due every day at the time `at`, in UTC.

    It is either a `statement` in ddl/<pack>/jobs.sql, which runs in one transaction with the record of the run, or a
    `command` of the command line, which runs in a process of its own. After an interruption, as many runs are made up
    for as `catch_up` says, those of the last days. `needs` is the setting without which it cannot run.
    """

    name: str
    at: time
    meaning: str
    statement: str = ""
    command: tuple[str, ...] = ()
    catch_up: int = 1
    needs: str = ""
    pack: str = ""  # set by `bundled_jobs`; empty for a job that belongs to no pack

    @property
    def schedule(self) -> str:
        """When the job is due, for people."""
        return f"daily at {self.at:%H:%M} UTC"

    def due_before(self, now: datetime) -> datetime:
        """The last time at which the job was due, up to `now`."""
        due = datetime.combine(now.astimezone(UTC), self.at, UTC)
        return due if due <= now else due - DAY

    def due_after(self, now: datetime) -> datetime:
        """The first time after `now` at which the job is due."""
        return self.due_before(now) + DAY

    def run_for(self, due: datetime, now: datetime) -> datetime:
        """The due time that a run at `now` is for, if `due` is the first one without a run.

        It is later than `due` if more runs were missed than are made up for, and earlier if none was missed.
        """
        last = self.due_before(now)
        return last if due > now else max(due, last - DAY * (self.catch_up - 1))


BACKUP: Final = Job(
    name="backup",
    at=time(1),
    meaning="a backup of the whole database in ROWCAST_BACKUP_DIR",
    command=("backup",),
    needs="backup_dir",
)
"""The job that belongs to no pack."""
