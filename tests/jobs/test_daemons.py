"""Jobs as an operator has them: real daemons, the command line, the files in the backup directory."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from daemon.commands.backup import BackupCorrupt, keep_backups
from daemon.commands.backup_file import inspect
from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from daemon.settings import load
from tests.support.daemon import Daemon, Frame, clean_environment, command, daemon_process, get, start
from tests.support.postgres import Server, ignore

PACKS = ("asyncops", "antone")


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    build = partial(migrate.apply, packs=PACKS, report=ignore)
    async with postgres.database(await postgres.template("jobs", build)) as dsn:
        yield dsn


@pytest.fixture
async def owner(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    return tmp_path / "backups"


async def due_since(owner: Connection, key: str, at: str, days: int) -> None:
    """Move the clock: as if the daemons had been off since the job was last due, at this time so many days ago."""
    await owner.execute(
        "insert into rowcast.jobs (key, due_at)"
        " select $1, due - interval '1 day' * ($3 - case when due > now() then 0 else 1 end)"
        " from (select date_trunc('day', now(), 'UTC') + $2::text::interval as due) as today"
        " on conflict (key) do update set due_at = excluded.due_at",
        key,
        at,
        days,
    )


def lines(daemons: list[Daemon], event: str) -> list[Frame]:
    """The data of each log line of this event, of all daemons."""
    return [line["data"] for daemon in daemons for line in daemon.events() if line["event"] == event]


async def until_done(daemons: list[Daemon], times: int) -> list[Frame]:
    while len(found := lines(daemons, "job_done")) < times:
        assert [] == lines(daemons, "job_failed")
        await asyncio.sleep(0.01)
    return found


async def test_of_three_daemons_each_missed_run_is_done_by_one(dsn: str, owner: Connection, backups: Path) -> None:
    await due_since(owner, "asyncops_summary", "00:10", 3)
    await due_since(owner, "asyncops_archive", "00:20", 3)
    await due_since(owner, "backup", "01:00", 3)
    environment = {"ROWCAST_JOBS": "asyncops_summary,asyncops_archive,backup", "ROWCAST_BACKUP_DIR": str(backups)}
    async with AsyncExitStack() as stack:
        serving = [daemon_process(dsn, "--pack", "asyncops", environment=environment) for _ in range(3)]
        daemons = list(await asyncio.gather(*map(stack.enter_async_context, serving)))
        await until_done(daemons, 5)
        await asyncio.gather(*(daemon.stop() for daemon in daemons))
        done = lines(daemons, "job_done")
    assert ["asyncops_archive", "asyncops_summary", "asyncops_summary", "asyncops_summary", "backup"] == sorted(
        line["job"] for line in done
    )
    assert 5 == len({(line["job"], line["due"]) for line in done})
    assert 3 == await owner.fetchval("select count(*) from asyncops.daily_summaries")
    [file] = backups.iterdir()
    assert inspect(file, lambda _: None, 1 << 20)


async def test_another_daemon_runs_the_job_of_one_that_was_killed(dsn: str, owner: Connection, backups: Path) -> None:
    await due_since(owner, "backup", "01:00", 1)
    environment = {"ROWCAST_JOBS": "backup", "ROWCAST_BACKUP_DIR": str(backups)}
    async with owner.transaction():  # pg_dump waits for this lock
        await owner.execute("lock table asyncops.users in access exclusive mode")
        async with daemon_process(dsn, "--pack", "asyncops", environment=environment) as first:
            claimed = "select claim is not null from rowcast.jobs where key = 'backup'"
            while not await owner.fetchval(claimed):
                await asyncio.sleep(0)
            assert "running since" in (await shown(dsn))["backup"]["outcome"]
            code, _, errors = await command(
                "jobs", "run", "backup", DATABASE_URL=dsn, ROWCAST_BACKUP_DIR=str(backups)
            )
            assert 75 == code
            assert (
                "daemon: The job backup is running already, here or on another machine: try again later.\n" == errors
            )
            await first.stop(signal.SIGKILL)
    await owner.execute("update rowcast.jobs set claimed_until = now()")  # the clock moves on
    async with daemon_process(dsn, "--pack", "asyncops", environment=environment) as second:
        await until_done([second], 1)
        assert "done" == (await shown(dsn))["backup"]["outcome"]
        while 'rowcast_job_last_success_timestamp_seconds{job="backup"}' not in (page := await metrics(second)):
            await asyncio.sleep(0.01)
        assert '\nrowcast_job_failures_total{job="backup"} 0.0\n' in page


async def metrics(daemon: Daemon) -> str:
    return (await get(f"{daemon.http}/metrics"))[1]


async def test_a_daemon_whose_job_fails_is_ready_and_warns(dsn: str, owner: Connection) -> None:
    await due_since(owner, "asyncops_archive", "00:20", 1)
    await owner.execute("alter function asyncops.archive rename to elsewhere")
    async with daemon_process(dsn, "--pack", "asyncops", environment={"ROWCAST_JOBS": "asyncops_archive"}) as daemon:
        while '\nrowcast_job_failures_total{job="asyncops_archive"} 1.0\n' not in await metrics(daemon):
            await asyncio.sleep(0.01)
        while "warnings" not in (ready := json.loads((await get(f"{daemon.http}/readyz"))[1])):
            await asyncio.sleep(0.01)
        [failed] = lines([daemon], "job_failed")
    assert (True, []) == (ready["ready"], ready["reasons"])
    assert [f"the job asyncops_archive fails ({failed['reason']})"] == ready["warnings"]
    assert "function asyncops.archive(as_of => timestamp with time zone) does not exist" in failed["reason"]


async def shown(dsn: str, *packs: str) -> dict[str, dict[str, str]]:
    """What `daemon jobs` says about each job."""
    arguments = [word for pack in packs or ("asyncops",) for word in ("--pack", pack)]
    code, output, errors = await command(*arguments, "jobs", DATABASE_URL=dsn)
    assert (0, "") == (code, errors)
    heading, *rows = output.splitlines()
    columns = [(found[0].lower(), found.start()) for found in re.finditer(r"\S+( \S+)*", heading)]
    ends = [begin for _, begin in columns[1:]] + [None]
    return {
        row.split()[0]: {name: row[begin:end].strip() for (name, begin), end in zip(columns, ends, strict=True)}
        for row in rows
    }


async def test_the_command_shows_last_and_next_run_and_runs_a_job_at_once(dsn: str, owner: Connection) -> None:
    never = {"last run": "never", "outcome": "-", "next run": "not scheduled"}
    assert {
        "asyncops_summary": {"job": "asyncops_summary", "schedule": "daily at 00:10 UTC"} | never,
        "asyncops_archive": {"job": "asyncops_archive", "schedule": "daily at 00:20 UTC"} | never,
        "antone_archive": {"job": "antone_archive", "schedule": "daily at 00:30 UTC"} | never,
        "backup": {"job": "backup", "schedule": "daily at 01:00 UTC"} | never,
    } == await shown(dsn, *PACKS)
    code, output, errors = await command("--pack", "asyncops", "jobs", "run", "asyncops_summary", DATABASE_URL=dsn)
    assert (0, "") == (code, errors)
    assert re.fullmatch(r"asyncops_summary: done, for \d{4}-\d\d-\d\d 00:10:00 UTC\n", output)
    summary = (await shown(dsn))["asyncops_summary"]
    assert "done" == summary["outcome"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", summary["last run"])
    assert summary["next run"].endswith(" 00:10:00")
    await due_since(owner, "asyncops_summary", "00:10", 5)
    code, output, _ = await command("--pack", "asyncops", "jobs", "run", "asyncops_summary", DATABASE_URL=dsn)
    assert (0, 5) == (code, len(output.splitlines()))  # and what was missed
    await owner.execute("alter table asyncops.daily_summaries rename to elsewhere")
    code, output, errors = await command("--pack", "asyncops", "jobs", "run", "asyncops_summary", DATABASE_URL=dsn)
    assert (44, "", 1) == (code, output, len(errors.splitlines()))
    assert 'daemon: The job asyncops_summary failed: The database reported an error: relation "' in errors
    assert "failed (1): The database reported" in (await shown(dsn))["asyncops_summary"]["outcome"]
    code, output, _ = await command("--pack", "asyncops", "jobs", "--json", DATABASE_URL=dsn)
    [record, *_] = [json.loads(line) for line in output.splitlines()]
    assert ("asyncops_summary", 1, False) == (record["job"], record["failures"], record["is_running"])


async def test_a_job_that_is_unknown_or_lacks_its_directory_is_refused_in_one_line(
    dsn: str, empty_database: str
) -> None:
    cases = {
        ("asyncops", "jobs", "run", "antone_archive"): (
            64,
            'The configured packs have no job "antone_archive": choose among asyncops_summary, asyncops_archive, '
            "backup.",
        ),
        ("asyncops", "jobs", "run", "backup"): (
            78,
            "The job backup needs a directory for its files: set ROWCAST_BACKUP_DIR.",
        ),
        ("asyncops", "backup"): (78, "There is no place for the backup: give a FILE, or set ROWCAST_BACKUP_DIR."),
    }
    for arguments, (code, line) in cases.items():
        assert (code, "", f"daemon: {line}\n") == await command("--pack", *arguments, DATABASE_URL=dsn)
    code, _, errors = await command("--pack", "asyncops", DATABASE_URL=dsn, ROWCAST_JOBS="all")
    assert (78, True) == (code, errors.endswith("set ROWCAST_BACKUP_DIR.\n"))
    code, _, errors = await command("--pack", "asyncops", "jobs", DATABASE_URL=dsn, ROWCAST_JOBS="backups")
    assert 78 == code
    assert "daemon: ROWCAST_JOBS: there is no job backups: choose among " in errors
    code, _, errors = await command("--pack", "asyncops", "jobs", DATABASE_URL=empty_database)
    assert (32, 1) == (code, len(errors.splitlines()))


async def test_old_rows_are_archived_by_the_job_in_the_directory_of_the_settings(
    dsn: str, owner: Connection, tmp_path: Path
) -> None:
    await owner.execute(
        "insert into antone.audit_logs (entity_type, entity_id, action, actor, created_at)"
        " select 'reply', gen_random_uuid(), 'approve', 'Olga', now() - interval '5 years' from generate_series(1, 3)"
    )
    code, output, errors = await command(
        *(word for pack in PACKS for word in ("--pack", pack)), "jobs", "run", "antone_archive",
        DATABASE_URL=dsn, ROWCAST_ARCHIVE_DIR=str(tmp_path), ROWCAST_JOBS="asyncops_summary", ROWCAST_RETENTION="36h",
    )  # fmt: skip
    assert (0, "") == (code, errors)
    assert "3 rows in 1 files" in output
    assert 1 == len(list(tmp_path.glob("audit_logs-*.json.gz")))


WAITING = "select pid from pg_locks where not granted and relation = 'asyncops.users'::regclass"


async def test_the_newest_backups_are_kept_and_none_is_removed_until_a_new_one_stands(
    dsn: str, owner: Connection, backups: Path
) -> None:
    async def back_up(keep: int) -> tuple[int, str, str]:
        return await command(
            "backup", DATABASE_URL=dsn, ROWCAST_BACKUP_DIR=str(backups), ROWCAST_BACKUP_KEEP=str(keep)
        )

    name = await owner.fetchval("select current_database()")
    backups.mkdir()
    others = {"notes.txt", f"{name}-copy-20250101T000000.000000Z.backup", "other-20250101T000000.000000Z.backup"}
    old = [f"{name}-2025010{day}T000000.000000Z.backup" for day in range(1, 9)]
    for file in (*others, *old):
        (backups / file).write_text("precious")
    abandoned = backups / f".{old[0]}.part"
    abandoned.write_text("incomplete")
    os.utime(abandoned, (0, 0))
    in_progress = backups / f".{old[1]}.part"
    in_progress.write_text("incomplete")
    async with owner.transaction():  # pg_dump waits for this lock
        await owner.execute("lock table asyncops.users in access exclusive mode")
        failing = asyncio.create_task(back_up(1))
        while (pid := await owner.fetchval(WAITING)) is None:
            assert not failing.done()
        await owner.execute("select pg_terminate_backend($1)", pid)
        code, _, errors = await failing
        assert 74 == code
        assert "daemon: The backup failed: " in errors
    found = {file.name for file in backups.iterdir()}
    assert {*others, *old, abandoned.name, in_progress.name} == found
    code, output, errors = await back_up(7)
    assert (0, "") == (code, errors)
    assert 3 == output.count(": removed\n")
    [new] = {file.name for file in backups.iterdir()} - found
    assert {*others, *old[2:], new, in_progress.name} == {file.name for file in backups.iterdir()}
    assert inspect(backups / new, lambda _: None, 1 << 20)
    assert 0o600 == (backups / new).stat().st_mode & 0o777
    assert 0 == (await back_up(1))[0]
    [newest] = [file.name for file in backups.iterdir() if file.name not in {*others, in_progress.name}]
    assert newest > new


async def test_a_backup_that_does_not_read_back_is_removed_and_the_older_ones_are_kept(
    dsn: str, backups: Path
) -> None:
    settings = load(database_url=dsn, backup_dir=backups, backup_keep=1)
    await keep_backups(settings, report=ignore)
    [good] = backups.iterdir()

    def damage(line: str) -> None:
        """A disk that loses the last byte of the file that has just been written."""
        path = Path(line.rpartition(": ")[0])
        os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(BackupCorrupt, match="its end is missing"):
        await keep_backups(settings, report=damage)
    assert [good] == list(backups.iterdir())


async def test_a_pack_in_another_schema_has_jobs_of_its_own(dsn: str, owner: Connection) -> None:
    await migrate.apply(dsn, ["asyncops"], schemas={"asyncops": "other"}, report=ignore)
    for arguments in ((), ("--schema", "other")):
        code, output, errors = await command(
            "--pack", "asyncops", *arguments, "jobs", "run", "asyncops_summary", DATABASE_URL=dsn
        )
        assert (0, "") == (code, errors)
        assert output.startswith("asyncops_summary@other: done" if arguments else "asyncops_summary: done")
        assert bool(arguments) == await owner.fetchval("select exists (select from other.daily_summaries)")
    assert 2 == await owner.fetchval("select count(*) from rowcast.jobs")


async def test_a_command_that_is_interrupted_leaves_no_incomplete_backup(
    dsn: str, owner: Connection, backups: Path, tmp_path: Path
) -> None:
    environment = clean_environment(DATABASE_URL=dsn, ROWCAST_BACKUP_DIR=str(backups))
    async with owner.transaction():
        await owner.execute("lock table asyncops.users in access exclusive mode")
        with (tmp_path / "errors").open("wb") as errors:
            process = await start(
                "jobs", "run", "backup", environment=environment, directory=tmp_path, errors=errors.fileno()
            )
        while not (backups.exists() and list(backups.iterdir())):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert 130 == await process.wait()
    assert [] == list(backups.iterdir())


async def test_a_daemon_that_stops_ends_its_job_and_leaves_it_to_the_next(
    dsn: str, owner: Connection, backups: Path
) -> None:
    await due_since(owner, "backup", "01:00", 1)
    environment = {"ROWCAST_JOBS": "backup", "ROWCAST_BACKUP_DIR": str(backups)}
    async with owner.transaction():
        await owner.execute("lock table asyncops.users in access exclusive mode")
        async with daemon_process(dsn, "--pack", "asyncops", environment=environment) as daemon:
            while await owner.fetchval(WAITING) is None:
                await asyncio.sleep(0)
            assert 0 == await daemon.stop()
            assert [] == lines([daemon], "job_failed")
        assert [] == list(backups.iterdir())
    await owner.execute("update rowcast.jobs set claimed_until = now()")
    assert 0 == (await command("jobs", "run", "backup", DATABASE_URL=dsn, ROWCAST_BACKUP_DIR=str(backups)))[0]
