"""`daemon archive antone` moves old rows to files: all of them, no others, and also after a crash."""

import asyncio
import csv
import gzip
import json
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from daemon.extensions.antone import archive as antone
from daemon.extensions.antone.archive import (
    CSV,
    JSON,
    JSON_GZ,
    ArchiveCorrupt,
    ArchiveInProgress,
    ArchiveNotWritable,
    Format,
    fingerprint,
    read_back,
)
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from daemon.settings import Settings, load
from tests.packs.databases import session
from tests.support.catalog import contents
from tests.support.daemon import clean_environment, command
from tests.support.postgres import Server

# Posts of two days that are old enough, and of one that is not; each with a decision and its children.
OLD = """
insert into antone.authors (id, platform, platform_id, handle)
values (md5('author')::uuid, 'REDDIT', 'author', 'author');
insert into antone.competitors (id, name, category_id)
values (md5('competitor')::uuid, 'Slumbera', 'c0000000-0000-4000-8000-000000000001');
insert into antone.posts (id, platform, platform_post_id, author_id, content, detected_at, raw_metrics)
select md5('post ' || n)::uuid, 'REDDIT', 'post-' || n, md5('author')::uuid, E'line 1\\nline 2, "quoted" — ' || n,
       date_trunc('day', now() at time zone 'UTC') at time zone 'UTC'
       - case when n <= 5 then interval '100 days' when n <= 8 then interval '95 days' else interval '10 days' end
       + n * interval '1 minute', '{"likes": 12345678901234567890.123456789}'
from generate_series(1, 10) as n;
insert into antone.decisions (
    id, post_id, sss_score, ars_score, evs_score, trs_score, composite_score, mode, created_at
)
select md5('decision ' || p.platform_post_id)::uuid, p.id, 0.1, 0.2, 0.3, 0.4, 1.0 / 3, 'HELPFUL', p.detected_at
from antone.posts as p;
insert into antone.randomized_experiments (decision_id, predicted_mode, actual_mode, created_at)
select d.id, 'HELPFUL', 'HYBRID', d.created_at from antone.decisions as d;
insert into antone.competitive_mentions (post_id, competitor_id, sentiment, opportunity_score, created_at)
select p.id, md5('competitor')::uuid, -0.5, 0.5, p.detected_at from antone.posts as p;
"""
# What keeps an old post: a reply, an open escalation, a recent decision.
KEPT = """
insert into antone.replies (decision_id, content, archetype_id, platform, utm_code)
values (
    md5('decision post-1')::uuid, 'Sleep well. —Antone (Vita)', 'a0000000-0000-4000-8000-000000000003', 'REDDIT', 'a'
);
insert into antone.escalations (post_id, reason_id, status)
values (md5('post 2')::uuid, 'e0000000-0000-4000-8000-000000000001', 'IN_PROGRESS');
insert into antone.escalations (decision_id, reason_id)
values (md5('decision post-6')::uuid, 'e0000000-0000-4000-8000-000000000001');
insert into antone.decisions (post_id, sss_score, ars_score, evs_score, trs_score, composite_score, mode)
values (md5('post 7')::uuid, 0, 0, 0, 0, 0, 'HYBRID');
"""
OTHERS = """
insert into antone.kpi_metrics (date, platform, metric_type_id, metric_name, value)
select (date_trunc('quarter', now() at time zone 'UTC' - interval '2 years') - n * interval '1 day')::date, 'REDDIT',
       'd0000000-0000-4000-8000-000000000001', 'thanks, "all"', n / 3.0
from generate_series(-1, 100) as n;
insert into antone.audit_logs (entity_type, entity_id, action, actor, details_json, created_at)
select 'reply', gen_random_uuid(), 'approve', 'Olga', '{"n": 1e30}',
       (date_trunc('year', now() at time zone 'UTC' - interval '3 years') - n * interval '30 days') at time zone 'UTC'
from generate_series(0, 13) as n;
"""
GONE = {"3", "4", "5", "8"}


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["antone"], report=lambda _: None)

    async with postgres.database(await postgres.template("antone", build)) as found:
        yield found


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Connection]:
    async with session(dsn) as connection:
        yield connection


def settings(dsn: str) -> Settings:
    return load(database_url=dsn, packs=("antone",))


async def run(dsn: str, directory: Path, **options: Any) -> tuple[int, list[str]]:
    """The number of rows that were archived, and the reported lines."""
    lines: list[str] = []
    rows = await antone.archive(settings(dsn), directory, report=lines.append, **{"dry_run": False} | options)
    return rows, lines


def records(directory: Path, table: str) -> list[dict[str, Any]]:
    """The records in all archived files of a table."""
    found: list[dict[str, Any]] = []
    for path in sorted(directory.glob(f"{table}-*")):
        if path.name.endswith(".gz"):
            found += json.loads(gzip.decompress(path.read_bytes()))
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                found += list(csv.DictReader(file))
        else:
            found += json.loads(path.read_text())
    return found


def numbers(posts: list[dict[str, Any]]) -> list[str]:
    return sorted(post["platform_post_id"].removeprefix("post-") for post in posts)


async def remaining(sql: Connection) -> set[str]:
    return {row["id"] for row in await sql.fetch("select substr(platform_post_id, 6) as id from antone.posts")}


async def test_only_posts_of_whole_days_that_are_old_enough_are_archived(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD + KEPT)
    rows, lines = await run(dsn, tmp_path / "archive")
    assert (4, "4 rows in 2 files") == (rows, lines[-1])
    assert sorted(GONE) == numbers(records(tmp_path / "archive", "posts"))
    assert {str(n) for n in range(1, 11)} - GONE == await remaining(sql)
    for table in ("decisions", "competitive_mentions", "randomized_experiments"):
        orphans = f"select count(*) from antone.{table}"
        assert (7 if table == "decisions" else 6) == await sql.fetchval(orphans)
    assert (0, ["nothing is old enough"]) == await run(dsn, tmp_path / "archive")


async def test_replies_are_kept_with_all_that_they_refer_to(dsn: str, sql: Connection, tmp_path: Path) -> None:
    await sql.execute(OLD + KEPT)
    await run(dsn, tmp_path)
    found = await sql.fetchrow(
        "select r.content, d.mode, p.content as post, a.handle from antone.replies r"
        " join antone.decisions d on d.id = r.decision_id join antone.posts p on p.id = d.post_id"
        " join antone.authors a on a.id = p.author_id"
    )
    assert found is not None
    assert ("HELPFUL", "author") == (found["mode"], found["handle"])


async def test_a_post_is_archived_once_its_escalations_are_resolved(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD + KEPT)
    await run(dsn, tmp_path)
    await sql.execute("update antone.escalations set status = 'RESOLVED', resolved_by = 'Olga', resolved_at = now()")
    escalations = {str(row["id"]) for row in await sql.fetch("select id from antone.escalations")}
    rows, _ = await run(dsn, tmp_path)
    assert 2 == rows
    archived = [post for post in records(tmp_path, "posts") if post["escalations"]]
    assert ["2", "6"] == numbers(archived)
    assert escalations == {escalation for post in archived for escalation in post["escalations"]}
    assert 2 == await sql.fetchval(
        "select count(*) from antone.escalations where post_id is null and decision_id is null"
    )


async def test_a_file_of_posts_contains_all_rows_that_the_deletion_removes(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    before = {
        table: {
            row["id"]: json.loads(row["record"])
            for row in await sql.fetch(f"select id::text, to_jsonb(t)::text as record from antone.{table} as t")
        }
        for table in ("posts", "decisions", "competitive_mentions", "randomized_experiments")
    }
    await run(dsn, tmp_path)
    for post in records(tmp_path, "posts"):
        [decision] = post.pop("decisions")
        [mention] = post.pop("competitive_mentions")
        [experiment] = decision.pop("randomized_experiments")
        assert [] == post.pop("escalations")
        assert before["posts"][post["id"]] == post
        assert before["decisions"][decision["id"]] == decision
        assert before["competitive_mentions"][mention["id"]] == mention
        assert before["randomized_experiments"][experiment["id"]] == experiment
    text = "".join(path.read_text() for path in tmp_path.glob("posts-*"))
    assert 8 == text.count("12345678901234567890.123456789")


async def test_the_last_moment_of_the_last_day_is_archived_and_the_next_is_not(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    limit = "(date_trunc('day', now() at time zone 'UTC') - interval '90 days') at time zone 'UTC'"
    await sql.execute(
        f"update antone.posts set detected_at = {limit} where platform_post_id = 'post-1';"
        f"update antone.posts set detected_at = {limit} - interval '1 microsecond' where platform_post_id = 'post-2'"
    )
    await run(dsn, tmp_path)
    assert {"1", "9", "10"} == await remaining(sql)


async def test_metrics_are_archived_to_csv_by_quarter_after_two_years(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OTHERS)
    before = {
        str(row["id"]): row for row in await sql.fetch("select *, value::text as written from antone.kpi_metrics")
    }
    limit: date = await sql.fetchval(
        "select date_trunc('quarter', now() at time zone 'UTC' - interval '2 years')::date"
    )
    rows, _ = await run(dsn, tmp_path)
    archived = records(tmp_path, "kpi_metrics")
    assert rows == len(archived) + len(records(tmp_path, "audit_logs"))
    assert 100 == len(archived)
    for metric in archived:
        row = before[metric["id"]]
        assert (row["date"].isoformat(), row["written"], 'thanks, "all"', "ENGAGEMENT") == (
            metric["date"],
            metric["value"],
            metric["metric_name"],
            metric["metric_type"],
        )
        assert row["date"] < limit
    assert 2 == await sql.fetchval("select count(*) from antone.kpi_metrics where date >= $1", limit)
    assert 2 == await sql.fetchval("select count(*) from antone.kpi_metrics")
    for path in tmp_path.glob("kpi_metrics-*.csv"):
        year, quarter = path.name.split("-")[1:3]
        with path.open(newline="") as file:
            days = [date.fromisoformat(row["date"]) for row in csv.DictReader(file)]
        assert {(year, quarter)} == {(str(day.year), f"Q{(day.month + 2) // 3}") for day in days}


async def test_audit_logs_are_archived_to_compressed_json_by_year_after_three_years(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OTHERS)
    before = {
        row["id"]: json.loads(row["record"])
        for row in await sql.fetch("select id::text, to_jsonb(a)::text as record from antone.audit_logs as a")
    }
    await run(dsn, tmp_path)
    archived = records(tmp_path, "audit_logs")
    assert 13 == len(archived)
    assert all(before[log["id"]] == log for log in archived)
    assert 1 == await sql.fetchval("select count(*) from antone.audit_logs")
    for path in tmp_path.glob("audit_logs-*.json.gz"):
        years = {log["created_at"][:4] for log in json.loads(gzip.decompress(path.read_bytes()))}
        assert {path.name.split("-")[1]} == years


async def test_a_dry_run_reports_what_a_run_would_do_and_writes_nothing(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD + KEPT + OTHERS)
    before = await contents(dsn, "antone")
    rows, lines = await run(dsn, tmp_path / "archive", dry_run=True)
    assert 0 == rows
    assert before == await contents(dsn, "antone")
    assert not (tmp_path / "archive").exists()
    moved, _ = await run(dsn, tmp_path / "archive")
    assert f"dry run: {moved} rows are old enough" == lines[-1]
    predicted = {" ".join(line.split()[:2]).rstrip(":"): int(line.split()[2]) for line in lines[:-1]}
    done: dict[str, int] = {}
    for row in await sql.fetch("select table_name || ' ' || period as period, row_count from antone.archived_files"):
        done[row["period"]] = done.get(row["period"], 0) + row["row_count"]
    assert predicted == done


async def test_a_period_with_many_rows_is_split_into_files_that_are_all_in_the_ledger(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    tmp_path = tmp_path / "made" / "here"
    rows, lines = await run(dsn, tmp_path, rows_per_file=2)
    assert 0o700 == tmp_path.stat().st_mode & 0o777
    files = await sql.fetch("select * from antone.archived_files order by name")
    assert (8, [1, 1, 2, 2, 2]) == (rows, sorted(file["row_count"] for file in files))
    assert [file["name"] for file in files] == sorted(path.name for path in tmp_path.iterdir())
    for file in files:
        path = tmp_path / file["name"]
        assert file["sha256"] == sha256(path.read_bytes()).hexdigest()
        assert 0o600 == path.stat().st_mode & 0o777
        assert file["completed_at"] is not None
        assert any(line.startswith(f"{file['name']}: {file['row_count']} rows, sha256 ") for line in lines)
    assert 5 == sum(" of " in line for line in lines)  # progress after each file
    assert [str(n) for n in range(1, 9)] == numbers(records(tmp_path, "posts"))


async def test_followers_receive_the_deletion_of_archived_posts(dsn: str, sql: Connection, tmp_path: Path) -> None:
    await sql.execute(OLD)
    await run(dsn, tmp_path)
    deletions = await sql.fetchval(
        "select count(*) from rowcast.events e join rowcast.watched w on w.id = e.watch"
        " where (w.table_name, e.topic, e.kind) = ('posts', 'platform:REDDIT', 'delete')"
    )
    assert 8 == deletions


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_the_last(data: bytes) -> bytes:
    return JSON.encode([json.dumps(record) for record in json.loads(data)[:-1]])


def with_another_word(data: bytes) -> bytes:
    return data.replace(b"line 1", b"line 7", 1)


@pytest.mark.parametrize("damage", [cut, without_the_last, with_another_word, lambda _: b""])
async def test_no_row_is_deleted_if_its_file_does_not_read_back(
    dsn: str, sql: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    await sql.execute(OLD)
    before = await contents(dsn, "antone")
    save = antone.save
    with monkeypatch.context() as disk:
        disk.setattr(antone, "save", lambda path, data: save(path, damage(data)))
        with pytest.raises(ArchiveCorrupt) as caught:
            await run(dsn, tmp_path)
    assert 74 == caught.value.exit_code
    after = await contents(dsn, "antone")
    assert 1 == after.pop("antone.archived_files") - before.pop("antone.archived_files")  # begun and not completed
    assert before == after
    rows, lines = await run(dsn, tmp_path)
    assert 8 == rows
    assert "removed, since its run was stopped before its rows were deleted" in lines[0]
    assert [str(n) for n in range(1, 9)] == numbers(records(tmp_path, "posts"))


@pytest.mark.parametrize("form", [JSON, CSV, JSON_GZ], ids=lambda form: form.suffix)
def test_a_file_reads_back_to_the_last_digit_or_is_refused(tmp_path: Path, form: Format) -> None:
    texts = ['{"a": "1.10000000000000000000001", "b": "x\\ny, \\"z\\""}', '{"a": "", "b": "—"}']
    expected = fingerprint([json.loads(text) for text in texts])
    path = tmp_path / "file"
    data = form.encode(texts)
    antone.save(path, data)
    assert sha256(data).hexdigest() == read_back(path, form, expected)
    for damaged in (b"", data[:-20], form.encode(texts[:1]), form.encode(texts[::-1]), form.encode([texts[0]] * 2)):
        antone.save(path, damaged)
        with pytest.raises(ArchiveCorrupt):
            read_back(path, form, expected)
    path.unlink()
    with pytest.raises(ArchiveCorrupt):
        read_back(path, form, expected)


async def blocked(watcher: Connection, name: str) -> int:
    """Wait until a session of this name waits for a lock; its process id."""
    while True:
        found = await watcher.fetchval(
            "select pid from pg_stat_activity where application_name = $1 and datname = current_database()"
            " and pg_blocking_pids(pid) <> '{}'",
            name,
        )
        if found:
            return int(found)


async def test_after_a_kill_every_row_is_in_the_table_or_in_one_complete_file(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    async with session(dsn) as holder:
        # The trigger blocks the last step: the file exists, the rows are deleted, and nothing is committed.
        holding = holder.transaction()
        await holding.start()
        await holder.execute(
            "create function antone.wait() returns trigger language plpgsql as"
            " $$ begin perform pg_advisory_xact_lock(1); return new; end $$;"
            "create trigger wait before update on antone.archived_files for each row execute function antone.wait()"
        )
        await holding.commit()
        await holder.execute("select pg_advisory_lock(1)")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", "archive", "antone", "--to", str(tmp_path)),
            env=clean_environment(DATABASE_URL=dsn),
            cwd=tempfile.gettempdir(),
            stdout=asyncio.subprocess.DEVNULL,
        )
        backend = await blocked(sql, "rowcast archive")
        process.send_signal(signal.SIGKILL)
        assert -signal.SIGKILL == await process.wait()
        [left] = tmp_path.iterdir()
        assert 5 == len(json.loads(left.read_text()))
        assert 10 == await sql.fetchval("select count(*) from antone.posts")
        await holder.execute("select pg_advisory_unlock(1)")
    while await sql.fetchval("select exists (select from pg_stat_activity where pid = $1)", backend):
        pass  # wait until the server has noticed
    assert 10 == await sql.fetchval("select count(*) from antone.posts")
    rows, lines = await run(dsn, tmp_path)
    assert 8 == rows
    assert lines[0].startswith(f"{left.name}: removed")
    assert not left.exists()
    assert [str(n) for n in range(1, 9)] == numbers(records(tmp_path, "posts"))
    assert {"9", "10"} == await remaining(sql)
    assert 0 == await sql.fetchval("select count(*) from antone.archived_files where completed_at is null")


async def test_unfinished_files_are_removed_and_other_files_are_not(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(
        "insert into antone.archived_files (name, table_name, period, host, directory)"
        " values ('posts-a.json', 'posts', 'a', null, null), ('posts-never-written.json', 'posts', 'a', $1, $2)",
        socket.gethostname(),
        str(tmp_path),
    )
    for name in (".posts-a.json.part", "posts-b.json", ".posts-b.json.part"):
        (tmp_path / name).write_text("half")
    _, lines = await run(dsn, tmp_path)
    assert [
        ".posts-a.json.part: removed, since its run was stopped before its rows were deleted",
        "nothing is old enough",
    ] == lines
    assert {"posts-b.json", ".posts-b.json.part"} == {path.name for path in tmp_path.iterdir()}
    assert 0 == await sql.fetchval("select count(*) from antone.archived_files")


async def test_an_unfinished_file_is_removed_although_the_next_run_writes_elsewhere(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    stopped = await left_by_a_stopped_run(dsn, sql, tmp_path / "first")
    rows, lines = await run(dsn, tmp_path / "second")
    assert 8 == rows
    assert lines[0].startswith(f"{stopped.name}: removed")
    assert [] == list((tmp_path / "first").iterdir())
    assert [str(n) for n in range(1, 9)] == numbers(records(tmp_path / "second", "posts"))


@pytest.mark.parametrize("lost", ["directory", "host"])
async def test_an_unfinished_file_out_of_reach_is_named_until_it_is_gone(
    dsn: str, sql: Connection, tmp_path: Path, lost: str
) -> None:
    await sql.execute(OLD)
    stopped = await left_by_a_stopped_run(dsn, sql, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "unmounted")
    if lost == "host":
        (tmp_path / "first").mkdir()
        await sql.execute("update antone.archived_files set host = 'elsewhere'")
    host = await sql.fetchval("select host from antone.archived_files")
    for expected in (8, 0):
        rows, lines = await run(dsn, tmp_path / "second")
        assert expected == rows
        assert lines[0].startswith(
            f"{stopped.name}: its run was stopped, so it may be left in {tmp_path / 'first'} on {host}"
        )
    (tmp_path / "first").rmdir() if lost == "host" else None
    (tmp_path / "unmounted").rename(tmp_path / "first")
    rows, lines = await run(dsn, tmp_path / "second")
    assert [f"{stopped.name}: removed, since its run was stopped before its rows were deleted"] == lines[:1]
    assert 0 == await sql.fetchval("select count(*) from antone.archived_files where completed_at is null")


async def left_by_a_stopped_run(dsn: str, sql: Connection, directory: Path) -> Path:
    """The file of a run that ended after it had written the file and before its transaction was committed."""
    await sql.execute(
        "create function antone.fail() returns trigger language plpgsql as $$ begin raise 'stopped'; end $$;"
        "create trigger stop before delete on antone.posts for each statement execute function antone.fail()"
    )
    with pytest.raises(DatabaseFault):
        await run(dsn, directory)
    await sql.execute("drop trigger stop on antone.posts; drop function antone.fail()")
    [left] = directory.iterdir()
    return left


async def test_a_database_without_the_pack_is_reported_in_one_line(empty_database: str, tmp_path: Path) -> None:
    code, output, errors = await command(
        "archive", "antone", "--to", str(tmp_path / "files"), DATABASE_URL=empty_database
    )
    assert (32, "") == (code, output)
    assert errors.startswith("daemon: The schema is not current (there is nothing to archive in this database)")


async def test_rows_locked_by_others_are_left_for_the_next_run(dsn: str, sql: Connection, tmp_path: Path) -> None:
    await sql.execute(OLD)
    async with session(dsn) as other:
        work = other.transaction()
        await work.start()
        await other.execute("update antone.posts set error_count = 1 where platform_post_id = 'post-3'")
        assert 7 == (await run(dsn, tmp_path))[0]
        await work.commit()
    assert {"3", "9", "10"} == await remaining(sql)
    assert 1 == (await run(dsn, tmp_path))[0]
    [late] = [post for post in records(tmp_path, "posts") if post["error_count"]]
    assert "post-3" == late["platform_post_id"]


async def test_a_post_that_is_answered_while_the_archive_waits_is_not_archived(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    async with session(dsn) as other:
        answering = other.transaction()
        await answering.start()
        await other.execute(KEPT.split(";", maxsplit=1)[0])
        running = asyncio.create_task(run(dsn, tmp_path))
        await blocked(sql, "rowcast archive")
        await answering.commit()
        rows, _ = await running
    assert 7 == rows
    assert {"1", "9", "10"} == await remaining(sql)
    assert "1" not in numbers(records(tmp_path, "posts"))


async def test_only_one_archive_runs_in_a_database_at_a_time(dsn: str, sql: Connection, tmp_path: Path) -> None:
    await sql.execute("select pg_advisory_lock($1)".replace("$1", str(antone._LOCK)))
    with pytest.raises(ArchiveInProgress) as caught:
        await run(dsn, tmp_path)
    assert 75 == caught.value.exit_code


async def test_an_unwritable_directory_is_reported_in_one_line_and_no_row_is_lost(
    dsn: str, sql: Connection, tmp_path: Path
) -> None:
    await sql.execute(OLD)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveNotWritable) as caught:
        await run(dsn, tmp_path / "file" / "below")
    assert 73 == caught.value.exit_code
    code, output, errors = await command(
        "archive",
        "antone",
        "--to",
        str(tmp_path / "file" / "below"),
        DATABASE_URL=dsn,
        ROWCAST_DATA_DIR=str(tmp_path),
    )
    assert (73, "") == (code, output)
    assert errors.startswith(f"daemon: {tmp_path}/file/below cannot be written (Not a directory): choose another")
    assert 10 == await sql.fetchval("select count(*) from antone.posts")


async def test_the_command_archives_and_reports_it_in_another_schema_too(empty_database: str, tmp_path: Path) -> None:
    await migrate.apply(empty_database, ["antone"], schemas={"antone": "elsewhere"}, report=lambda _: None)
    connection = await asyncpg.connect(empty_database)
    await connection.execute(OLD.replace("antone.", "elsewhere."))
    await connection.close()
    options = ("--schema", "elsewhere", "archive", "antone", "--to", str(tmp_path / "files"))
    code, output, errors = await command(*options, "--dry-run", DATABASE_URL=empty_database)
    assert (0, "", "dry run: 8 rows are old enough") == (code, errors, output.splitlines()[-1])
    code, output, errors = await command(*options, DATABASE_URL=empty_database)
    assert (0, "", "8 rows in 2 files") == (code, errors, output.splitlines()[-1])
    assert 8 == len(records(tmp_path / "files", "posts"))
    assert [tmp_path / "files"] == list(tmp_path.iterdir())


async def test_only_a_pack_with_a_retention_policy_can_be_archived(database: str) -> None:
    code, _, errors = await command("archive", "chatgenius", "--to", "anywhere", DATABASE_URL=database)
    assert 2 == code
    assert "'chatgenius' is not" in errors
