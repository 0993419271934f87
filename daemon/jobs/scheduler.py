"""The scheduler: runs jobs when they are due. Of all daemons on a database, one runs each.

The table rowcast.jobs says when each job is due and who runs it. All daemons go by the clock of the database, so it
does not matter how theirs differ.

- A job that is a statement holds the lock on its row, in the transaction of its work: the work and its record are
  committed together, and if the daemon dies, neither is.
- A job that is a command runs in a process of its own, so it cannot block the daemon. Its claim is renewed while it
  runs. If the daemon dies, the claim expires, and another daemon runs the job.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from daemon import files, metrics
from daemon.core.jobs import Job
from daemon.health import Progress
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import SESSION, Connect, Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, DRIVER_ERRORS, cancellation_first, describe, explain
from daemon.postgres.queries import Queries, split_statements
from daemon.schema import sql_files
from daemon.settings import Settings

log = get_logger()

query: Final = Queries(Path(__file__).with_name("queries.sql"))

LOOK_EVERY: Final = 30.0  # seconds between two looks at the table, unless a job is due earlier
STATE_TIMEOUT: Final = 10.0  # seconds for a statement about the state of a job
CLAIM_LENGTH: Final = timedelta(seconds=45)  # how long a claim holds that nobody renews
RENEW_EVERY: Final = 10.0  # seconds
RETRY_DELAY: Final = 60.0  # seconds: the upper bound of the first delay after a failure
MAX_RETRY_DELAY: Final = 3600.0  # seconds: the upper bound of every delay
COMMAND_TIMEOUT: Final = 12 * 3600.0  # seconds after which a command is taken to hang
STOP_TIMEOUT: Final = 3.0  # seconds that a command has to end when it is stopped

JOB_SESSION: Final = {
    name: SESSION[name] for name in ("idle_session_timeout", "idle_in_transaction_session_timeout", "lock_timeout")
} | {"statement_timeout": "15min"}
"""Session settings for a job that is a statement. Unlike the daemon's statements it may read whole tables."""


@dataclass(frozen=True, slots=True)
class State:
    """What is on record about a job, at the time `now`. Without a record, `due_at` is None."""

    now: datetime
    due_at: datetime | None
    retry_at: datetime | None
    started_at: datetime | None
    claimed_until: datetime | None
    last_due_at: datetime | None
    last_started_at: datetime | None
    last_ended_at: datetime | None
    succeeded_at: datetime | None
    failures: int
    reason: str | None

    @property
    def next_at(self) -> datetime | None:
        """When it runs next, if nothing is claimed; None if it is not on record."""
        return self.due_at and max(self.due_at, self.retry_at or self.due_at)

    @property
    def is_running(self) -> bool:
        """Whether a run is claimed."""
        return self.claimed_until is not None and self.claimed_until > self.now

    @property
    def is_due(self) -> bool:
        """Whether a run can be claimed."""
        return self.next_at is not None and self.next_at <= self.now and not self.is_running


@dataclass(frozen=True, slots=True)
class Run:
    """A run that this process has claimed: the due time that it is for, and how it ended."""

    due: datetime
    nonce: UUID
    failures: int  # in a row, before it
    failure: str | None = None
    has_more: bool = False


def key_of(job: Job, settings: Settings) -> str:
    """The key of a job in rowcast.jobs: a pack that lives in two schemas has its jobs in both."""
    schema = settings.schemas.get(job.pack, job.pack)
    return job.name if schema == job.pack else f"{job.name}@{schema}"


async def fetch_states(
    connection: Connection, keys: Sequence[str], clock: datetime | None = None
) -> dict[str, State]:
    """What is on record about these jobs, by key. Raises one of DRIVER_ERRORS."""
    states = {}
    for row in await connection.fetch(query("states"), keys, clock):
        columns = dict(row)
        key = columns.pop("key")
        states[key] = State(**columns)
    return states


class Scheduler:
    """Runs these jobs. `connect` opens a connection with the settings JOB_SESSION.

    The commands that it starts print to the output of this process if `prints`. `clock` takes the place of the clock
    of the database.
    """

    def __init__(
        self,
        pool: Pool,
        connect: Connect,
        settings: Settings,
        jobs: Sequence[Job],
        *,
        prints: bool = False,
        clock: Callable[[], datetime | None] = lambda: None,
    ) -> None:
        self.jobs = jobs
        self._pool, self._connect, self._settings, self._prints, self._clock = pool, connect, settings, prints, clock
        self._keys = {job.name: key_of(job, settings) for job in jobs}
        self._statements = {job.name: _statement(job, settings) for job in jobs if job.statement}
        self._failing: dict[str, str] = {}
        for key in self._keys.values():
            metrics.JOB_FAILURES.labels(job=key)

    def warnings(self) -> list[str]:
        """The jobs whose last run failed, on any daemon."""
        return [f"the job {key} fails ({reason})" for key, reason in self._failing.items()]

    async def run(self) -> None:
        """Run the jobs when they are due, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for job in self.jobs:
                group.create_task(self._repeat(job))

    async def _repeat(self, job: Job) -> None:
        progress = Progress()
        while True:
            pause = LOOK_EVERY
            try:
                with cancellation_first():
                    state = await self.run_due(job)
            except DATABASE_ERRORS as error:
                if progress.fail(describe(error)):
                    log.warning("job_failed", job=self._keys[job.name], reason=progress.failure)
            else:
                progress.end()
                if state.next_at and state.next_at > state.now:
                    pause = min(pause, (state.next_at - state.now).total_seconds())
            await asyncio.sleep(pause)

    async def run_due(self, job: Job) -> State:
        """Run the job as often as it is due, unless another daemon does; its state. Raises one of DATABASE_ERRORS."""
        while (state := await self.look(job)).is_due:
            began = time.monotonic()
            run = await self.attempt(job)
            if run is None:
                break
            key, due = self._keys[job.name], run.due.isoformat()
            if run.failure is not None:
                metrics.JOB_FAILURES.labels(job=key).inc()
                log.warning("job_failed", job=key, due=due, reason=run.failure)
            elif not run.has_more:
                log.info("job_done", job=key, due=due, seconds=round(time.monotonic() - began, 3))
        return state

    async def attempt(self, job: Job, *, at_once: bool = False) -> Run | None:
        """Run the job once if it is due, or `at_once`. None if it is not, or another daemon runs it.

        The first run that was missed comes first. Raises one of DATABASE_ERRORS if the run could not be recorded.
        """
        if at_once:
            await self.look(job)  # so that there is a record to claim
        return await (self._run_statement if job.statement else self._run_command)(job, at_once=at_once)

    async def look(self, job: Job) -> State:
        """The state of a job, with a new record if there is none."""
        key = self._keys[job.name]
        async with acquired(self._pool, STATE_TIMEOUT) as connection:
            state = (await fetch_states(connection, [key], self._clock()))[key]
            if state.due_at is None:
                await connection.execute(query("register"), key, job.due_after(state.now))
        if state.succeeded_at:
            metrics.JOB_LAST_SUCCESS.labels(job=key).set(state.succeeded_at.timestamp())
        self._failing.pop(key, None)
        if state.reason:
            self._failing[key] = state.reason
        return state

    async def _claim(self, connection: Connection, job: Job, *, at_once: bool) -> Run | None:
        nonce = uuid4()
        row = await connection.fetchrow(
            query("claim"), self._keys[job.name], self._clock(), at_once, nonce, CLAIM_LENGTH
        )
        return None if row is None else Run(job.run_for(row["due_at"], row["now"]), nonce, row["failures"])

    async def _record(self, connection: Connection, job: Job, run: Run) -> bool:
        """Record how a run ended; False if its claim was lost. Raises one of DRIVER_ERRORS."""
        identity = self._keys[job.name], self._clock(), run.nonce, run.due
        if run.failure is None:
            return bool(await connection.fetchval(query("succeed"), *identity, job.due_after(run.due)))
        delay = timedelta(seconds=backoff_delay(run.failures, initial=RETRY_DELAY, maximum=MAX_RETRY_DELAY))
        return bool(await connection.fetchval(query("fail"), *identity, run.failure, delay))

    async def _run_statement(self, job: Job, *, at_once: bool) -> Run | None:
        """Run a job that is a statement, once, in one transaction with its record."""
        connection = await self._connect()
        try:
            transaction, work = connection.transaction(), connection.transaction()
            await transaction.start()
            run = await self._claim(connection, job, at_once=at_once)
            if run is None:
                return None
            await work.start()  # a savepoint, so that a failure can be recorded by the one that holds the row
            try:
                has_more = await connection.fetchval(self._statements[job.name], run.due)
                await work.commit()
            except DRIVER_ERRORS as error:
                await work.rollback()
                run = replace(run, failure=str(explain(error)))
                has_more = False
            if has_more:
                await connection.execute(query("release"), self._keys[job.name], run.nonce)
                run = replace(run, has_more=True)
            else:
                await self._record(connection, job, run)
            await transaction.commit()
            return run
        finally:
            connection.terminate()  # without a commit, the server undoes all of it

    async def _run_command(self, job: Job, *, at_once: bool) -> Run | None:
        """Run a job that is a command of the command line, in a process, while its claim is renewed."""
        async with acquired(self._pool, STATE_TIMEOUT) as connection:
            run = await self._claim(connection, job, at_once=at_once)
        if run is None:
            return None
        working = asyncio.create_task(_run_process(job.command, self._settings, prints=self._prints))
        renewing = asyncio.create_task(self._renew(job, run))
        try:
            await asyncio.wait({working, renewing}, timeout=COMMAND_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                failure = working.result()
            else:
                failure = "its claim was lost" if renewing.done() else f"no end after {COMMAND_TIMEOUT:.0f} s"
        finally:
            for task in (working, renewing):
                task.cancel()
            await asyncio.wait({working, renewing})
        run = replace(run, failure=failure)
        async with acquired(self._pool, STATE_TIMEOUT) as connection:
            is_recorded = await self._record(connection, job, run)
        return run if is_recorded else replace(run, failure="its claim was lost")

    async def _renew(self, job: Job, run: Run) -> None:
        """Renew the claim; return once it is lost."""
        renewed = time.monotonic()
        while time.monotonic() - renewed < CLAIM_LENGTH.total_seconds():
            await asyncio.sleep(RENEW_EVERY)
            with suppress(*DATABASE_ERRORS):
                async with acquired(self._pool, STATE_TIMEOUT) as connection:
                    holds = await connection.fetchval(
                        query("renew"), self._keys[job.name], self._clock(), run.nonce, CLAIM_LENGTH
                    )
                if not holds:
                    return
                renewed = time.monotonic()


def _statement(job: Job, settings: Settings) -> str:
    """The text of a job's statement, for the schema of its pack. Raises BadSqlFile."""
    path = files.folder("ddl") / job.pack / "jobs.sql"
    text = sql_files.read(path, pack=job.pack, schema=settings.schemas[job.pack]).text
    return split_statements(text)[job.statement]


async def _run_process(command: Sequence[str], settings: Settings, *, prints: bool) -> str | None:
    """Run a command of the command line with these settings; why it failed, or None. Stops it when cancelled."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *command),
            env=settings.as_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=None if prints else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return error.strerror or str(error)
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            await _stop(process)
    if process.returncode == 0:
        return None
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.startswith("daemon: ")]
    return lines[-1].removeprefix("daemon: ") if lines else f"it ended with {process.returncode}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Interrupt a process, so that it cleans up, and kill it if it does not end."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.communicate()  # `wait` would wait for the end of what nobody reads
        except TimeoutError:
            process.kill()
            await process.communicate()
