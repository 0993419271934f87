"""`daemon jobs`: shows when the jobs ran and run next, and runs one at once."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, Final

import click

from daemon.core.errors import OperatorFault
from daemon.core.jobs import Job
from daemon.jobs.scheduler import JOB_SESSION, Scheduler, State, fetch_states, key_of
from daemon.jobs.selection import available_jobs, find_job
from daemon.postgres.connect import Connect, Pool, connect, open_pool
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, address_of, explain
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import Settings

_HEADINGS: Final = ("JOB", "SCHEDULE", "LAST RUN", "OUTCOME", "NEXT RUN")


class JobFailed(OperatorFault):
    """The job {job} failed: {reason}"""

    exit_code: ClassVar[int] = 44

    def __init__(self, job: str, reason: str) -> None:
        self.job, self.reason = job, reason


class JobRunning(OperatorFault):
    """The job {job} is running already, here or on another machine: try again later."""

    exit_code: ClassVar[int] = 75

    def __init__(self, job: str) -> None:
        self.job = job


async def show(settings: Settings, *, as_json: bool) -> None:
    """Print a line for each job of the configured packs. Raises an OperatorFault."""
    jobs = list(available_jobs(settings).values())
    async with _explained(settings):
        connection = await _connect(settings)()
        try:
            states = await fetch_states(connection, [key_of(job, settings) for job in jobs])
        finally:
            connection.terminate()
    shown = list(zip(jobs, states.items(), strict=True))
    if as_json:
        for job, (key, state) in shown:
            click.echo(json.dumps(_as_json(job, key, state)))
    else:
        for line in aligned([_HEADINGS, *(cells(job, key, state) for job, (key, state) in shown)]):
            click.echo(line)


def cells(job: Job, key: str, state: State) -> tuple[str, ...]:
    """What a line of the table says about a job."""
    ended = state.last_ended_at
    if state.is_running:
        outcome = f"running since {_written(state.started_at)}"
    elif ended is None:
        outcome = "-"
    else:
        outcome = f"failed ({state.failures}): {' '.join(state.reason.split())}" if state.reason else "done"
    return key, job.schedule, _written(ended) or "never", outcome, _written(state.next_at) or "not scheduled"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _written(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}" if at else ""


def _as_json(job: Job, key: str, state: State) -> dict[str, Any]:
    record = {field.name: getattr(state, field.name) for field in fields(state)} | {"next_at": state.next_at}
    del record["now"]
    written = {name: at.isoformat() if isinstance(at, datetime) else at for name, at in record.items()}
    return {"job": key, "schedule": job.schedule, "is_running": state.is_running, **written}


async def run_job(settings: Settings, name: str) -> None:
    """Run a job here at once, and all runs of it that were missed. Raises an OperatorFault."""
    job = find_job(settings, name)
    async with _explained(settings), _pool(settings) as pool:
        scheduler = Scheduler(pool, _connect(settings), settings, [job], prints=True)
        is_due = True
        while is_due:
            run = await scheduler.attempt(job, at_once=True)
            if run is None:
                raise JobRunning(job.name)
            if run.failure is not None:
                raise JobFailed(job.name, run.failure)
            if not run.has_more:
                click.echo(f"{key_of(job, settings)}: done, for {_written(run.due)} UTC")
            is_due = run.has_more or (await scheduler.look(job)).is_due


def _connect(settings: Settings) -> Connect:
    return partial(
        connect,
        settings.require_dsn(),
        application_name="rowcast jobs",
        server_settings=JOB_SESSION,
        attempts=settings.connect_attempts,
    )


@asynccontextmanager
async def _pool(settings: Settings) -> AsyncIterator[Pool]:
    pool = await open_pool(
        settings.require_dsn(),
        application_name="rowcast jobs",
        server_settings=JOB_SESSION,
        max_size=2,
        attempts=settings.connect_attempts,
    )
    try:
        yield pool
    finally:
        pool.terminate()


@asynccontextmanager
async def _explained(settings: Settings) -> AsyncIterator[None]:
    """Driver errors in the block are raised as an OperatorFault."""
    try:
        yield
    except DRIVER_ERRORS as error:
        fault = explain(error, address=address_of(settings.require_dsn()))
        if isinstance(fault, DatabaseFault) and fault.sqlstate in ("3F000", "42P01"):
            raise SchemaNotCurrent("there is no record of jobs in this database") from None
        raise fault from None
