"""Three schedulers on one database, over a changed clock: each run takes place once, wherever it does."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from daemon.core.jobs import BACKUP, Job
from daemon.jobs import scheduler as module
from daemon.jobs.scheduler import CLAIM_LENGTH, JOB_SESSION, Run, Scheduler, State, query
from daemon.jobs.selection import available_jobs
from daemon.metrics import REGISTRY
from daemon.postgres.connect import Connection, connect, open_pool
from daemon.schema import migrate
from daemon.settings import Settings, load
from tests.support.postgres import Server, ignore

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@dataclass
class Daemons:
    """Three schedulers, each with its own connections, and a clock that stands until it is moved."""

    sql: Connection
    settings: Settings
    now: datetime = START
    each: list[Scheduler] = field(default_factory=list)

    def clock(self) -> datetime:
        return self.now

    async def run_due(self, job: Job) -> State:
        """All of them do what they do when they look at the table."""
        *_, state = await asyncio.gather(*(scheduler.run_due(job) for scheduler in self.each))
        return state

    async def days(self) -> list[date]:
        """The days that have a summary."""
        return [
            row["day"]
            for row in await self.sql.fetch("select summary_date as day from asyncops.daily_summaries order by 1")
        ]


@pytest.fixture
async def daemons(postgres: Server, tmp_path: Path) -> AsyncIterator[Daemons]:
    build = partial(migrate.apply, packs=["asyncops"], report=ignore)
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(postgres.database(await postgres.template("asyncops jobs", build)))
        settings = load(database_url=dsn, packs=("asyncops",), backup_dir=tmp_path / "backups")
        sql = await connect(dsn, application_name="test")
        stack.push_async_callback(sql.close)
        daemons = Daemons(sql, settings)
        connecting = partial(connect, dsn, application_name="test jobs", server_settings=JOB_SESSION)
        for _ in range(3):
            pool = await open_pool(dsn, application_name="test", max_size=4)
            stack.push_async_callback(pool.close)
            jobs = list(available_jobs(settings).values())
            daemons.each.append(Scheduler(pool, connecting, settings, jobs, clock=daemons.clock))
        yield daemons


def job(daemons: Daemons, name: str) -> Job:
    return available_jobs(daemons.settings)[name]


def of(logged: Iterable[Mapping[str, Any]], event: str) -> list[Mapping[str, Any]]:
    return [line for line in logged if line["event"] == event]


async def test_each_day_one_of_three_daemons_writes_the_summary_of_the_day_before(daemons: Daemons) -> None:
    summary = job(daemons, "asyncops_summary")
    await daemons.run_due(summary)
    assert [] == await daemons.days()  # it is due for the first time in the night
    with capture_logs() as logged:
        for _ in range(3):
            daemons.now += DAY
            await daemons.run_due(summary)
            state = await daemons.run_due(summary)  # a second look changes nothing
    assert [date(2025, 3, day) for day in (1, 2, 3)] == await daemons.days()
    due = [f"2025-03-0{day}T00:10:00+00:00" for day in (2, 3, 4)]
    assert due == [line["due"] for line in of(logged, "job_done")]
    assert datetime(2025, 3, 5, 0, 10, tzinfo=UTC) == state.due_at
    assert (daemons.now, 0, None) == (state.succeeded_at, state.failures, state.reason)
    last = {"job": "asyncops_summary"}
    shown = REGISTRY.get_sample_value("rowcast_job_last_success_timestamp_seconds", last)
    assert daemons.now.timestamp() == shown


async def test_nothing_runs_before_its_time_and_everything_at_its_time(daemons: Daemons) -> None:
    summary = job(daemons, "asyncops_summary")
    await daemons.run_due(summary)
    daemons.now = datetime(2025, 3, 2, 0, 9, 59, 999999, tzinfo=UTC)
    state = await daemons.run_due(summary)
    assert timedelta(microseconds=1) == (state.next_at or START) - state.now
    assert [] == await daemons.days()
    daemons.now += timedelta(microseconds=1)
    await daemons.run_due(summary)
    assert [date(2025, 3, 1)] == await daemons.days()


async def test_missed_summaries_are_made_up_for_and_a_missed_archiving_once(daemons: Daemons) -> None:
    jobs = job(daemons, "asyncops_summary"), job(daemons, "asyncops_archive")
    for one in jobs:
        await daemons.run_due(one)
    daemons.now += 4 * DAY
    with capture_logs() as logged:
        for one in jobs:
            await daemons.run_due(one)
    assert [date(2025, 3, day) for day in (1, 2, 3, 4)] == await daemons.days()
    assert ["asyncops_summary"] * 4 + ["asyncops_archive"] == [line["job"] for line in of(logged, "job_done")]
    daemons.now += 100 * DAY
    await daemons.run_due(jobs[0])
    days = await daemons.days()
    assert 4 + 31 == len(days)
    assert (daemons.now - DAY).date() == days[-1]


async def test_archiving_goes_on_in_batches_until_nothing_is_left(daemons: Daemons) -> None:
    archive = job(daemons, "asyncops_archive")
    await daemons.run_due(archive)
    await daemons.sql.execute(
        """insert into asyncops.users (email, password_hash, full_name, role)
           values ('ada@example.org', '$2b$12$' || repeat('a', 53), 'Ada', 'admin');
           insert into asyncops.status_updates (user_id, title, content, created_at)
           select (select max(id) from asyncops.users), 'title', 'content', '2023-01-01'
           from generate_series(1, 2500)"""
    )
    daemons.now += DAY
    with capture_logs() as logged:
        await daemons.run_due(archive)
        await daemons.run_due(archive)
    assert 0 == await daemons.sql.fetchval("select count(*) from asyncops.live_status_updates")
    assert 1 == len(of(logged, "job_done"))


async def test_a_job_that_fails_is_recorded_and_tried_again_after_a_growing_delay(daemons: Daemons) -> None:
    summary, scheduler = job(daemons, "asyncops_summary"), daemons.each[0]
    await daemons.run_due(summary)
    await daemons.sql.execute("alter table asyncops.daily_summaries rename to elsewhere")
    daemons.now += DAY
    failures = {"job": "asyncops_summary"}
    before = REGISTRY.get_sample_value("rowcast_job_failures_total", failures) or 0
    with capture_logs() as logged:
        for number in range(1, 15):
            await daemons.run_due(summary)
            state = await scheduler.look(summary)
            assert number == state.failures
            assert state.retry_at is not None
            assert timedelta() <= state.retry_at - daemons.now <= timedelta(hours=1)
            daemons.now = state.retry_at
    assert 14 == len(of(logged, "job_failed"))
    assert 14 == (REGISTRY.get_sample_value("rowcast_job_failures_total", failures) or 0) - before
    [warning] = scheduler.warnings()
    assert warning.startswith("the job asyncops_summary fails (")
    assert "daily_summaries" in (state.reason or "")
    await daemons.sql.execute("alter table asyncops.elsewhere rename to daily_summaries")
    state = await daemons.run_due(summary)
    state = await scheduler.look(summary)
    assert (0, None) == (state.failures, state.reason)
    assert [] == scheduler.warnings()
    assert date(2025, 3, 1) == (await daemons.days())[0]


async def test_a_run_whose_connection_is_cut_leaves_nothing_and_another_daemon_takes_over(daemons: Daemons) -> None:
    summary = job(daemons, "asyncops_summary")
    await daemons.run_due(summary)
    daemons.now += DAY
    async with daemons.sql.transaction():  # the run waits for this lock, and holds its job
        await daemons.sql.execute("lock table asyncops.daily_summaries in exclusive mode")
        running = asyncio.create_task(daemons.each[0].run_due(summary))
        waiting = "select pid from pg_locks where not granted and relation = 'asyncops.daily_summaries'::regclass"
        while (pid := await daemons.sql.fetchval(waiting)) is None:
            assert not running.done()
        assert await daemons.each[1].attempt(summary) is None  # and does not wait
        await daemons.sql.execute("select pg_terminate_backend($1)", pid)
        [error] = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(error, Exception)
    with capture_logs() as logged:
        await daemons.each[1].run_due(summary)
    assert [date(2025, 3, 1)] == await daemons.days()
    assert 1 == len(of(logged, "job_done"))


async def test_an_expired_claim_is_taken_over_and_its_former_owner_records_nothing(daemons: Daemons) -> None:
    key = BACKUP.name
    await daemons.run_due(BACKUP)
    daemons.now += DAY
    nonce = uuid4()
    claimed = await daemons.sql.fetchrow(query("claim"), key, daemons.now, False, nonce, CLAIM_LENGTH)
    assert claimed is not None
    for _ in range(2):
        state = await daemons.run_due(BACKUP)
        assert (True, False) == (state.is_running, state.is_due)
        assert await daemons.sql.fetchval(query("renew"), key, daemons.now, nonce, CLAIM_LENGTH)
        daemons.now += CLAIM_LENGTH - timedelta(seconds=1)
    daemons.now += timedelta(seconds=1)
    with capture_logs() as logged:
        await daemons.run_due(BACKUP)
    assert [] == of(logged, "job_failed")
    assert 1 == len(of(logged, "job_done"))
    due = claimed["due_at"]
    assert await daemons.sql.fetchval(query("renew"), key, daemons.now, nonce, CLAIM_LENGTH) is None
    assert await daemons.sql.fetchval(query("succeed"), key, daemons.now, nonce, due, due + DAY) is None
    assert await daemons.sql.fetchval(query("fail"), key, daemons.now, nonce, due, "no", DAY) is None
    assert 0 == (await daemons.each[0].look(BACKUP)).failures


async def test_a_backup_that_was_missed_on_several_days_is_made_once(daemons: Daemons) -> None:
    assert daemons.settings.backup_dir
    await daemons.run_due(BACKUP)
    daemons.now += 5 * DAY
    await daemons.run_due(BACKUP)
    [made] = daemons.settings.backup_dir.iterdir()
    assert made.name.endswith(".backup")
    state = await daemons.each[0].look(BACKUP)
    assert datetime(2025, 3, 6, 1, tzinfo=UTC) == state.last_due_at
    assert datetime(2025, 3, 7, 1, tzinfo=UTC) == state.due_at


async def test_a_command_that_fails_says_why_as_it_does_on_the_command_line(daemons: Daemons, tmp_path: Path) -> None:
    (tmp_path / "backups").write_text("in the way")
    await daemons.run_due(BACKUP)
    daemons.now += DAY
    run = await daemons.each[0].attempt(BACKUP)
    assert run is not None
    assert f"{tmp_path / 'backups'} cannot be written (File exists): choose another file." == run.failure
    assert run.failure == (await daemons.each[1].look(BACKUP)).reason


async def test_a_command_whose_claim_is_lost_is_stopped(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_EVERY", 0.05)
    tail = replace(BACKUP, command=("tail", "team:members"))  # it would go on forever
    await daemons.run_due(BACKUP)
    daemons.now += DAY
    working = asyncio.create_task(daemons.each[0].attempt(tail))
    while not (await daemons.each[1].look(BACKUP)).is_running:
        assert not working.done()
    await daemons.sql.execute("update rowcast.jobs set claim = gen_random_uuid() where key = 'backup'")
    run = await working
    assert isinstance(run, Run)
    assert "its claim was lost" == run.failure


async def test_a_command_that_is_stopped_ends_whatever_it_says_meanwhile(
    daemons: Daemons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT", 1.0)
    talkative = tmp_path / "talkative"
    talkative.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'began')!r}).touch()\nwhile True: sys.stderr.write('x' * 65536)\n"
    )
    talkative.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(talkative))
    await daemons.run_due(BACKUP)
    daemons.now += DAY
    working = asyncio.create_task(daemons.each[0].attempt(BACKUP))
    while not (tmp_path / "began").exists():
        assert not working.done()
        await asyncio.sleep(0.01)
    working.cancel()
    await asyncio.wait({working}, timeout=20)
    assert working.cancelled()
