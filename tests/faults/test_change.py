"""Operations under load: migrations, applying the DDL again, clock changes."""

from dataclasses import replace

from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_TIMEOUT, Scenario, by_form, percentile, scenario
from tests.faults.oracle import Style
from tests.faults.results import Results
from tests.support.daemon import command

# Writers wait for the lock that each of these takes.
MIGRATIONS = (
    "alter table chatgenius.messages add column mood text",
    "alter table chatgenius.messages alter column mood set default 'fine'",
    "alter table chatgenius.messages alter column mood type varchar(20)",
    "alter table chatgenius.messages rename column mood to temper",
    "alter table chatgenius.messages drop column temper",
    "create index mood on chatgenius.messages (created_at); drop index chatgenius.mood",
    # Replaces the view that readers have prepared statements on, and changes a column from text to varchar, or back.
    """
    do $$
    declare
        definition text := pg_get_viewdef('rowcast.changes');
        varied constant text := '(l.topic)::character varying AS topic';
    begin
        drop view rowcast.changes;
        execute 'create view rowcast.changes as ' || case
            when strpos(definition, varied) > 0 then replace(definition, varied, 'l.topic')
            else replace(definition, 'l.topic', varied) end;
    end $$
    """,
    "select rowcast.unwatch('chatgenius.messages'); "
    "select rowcast.watch('chatgenius.messages', pack => 'chatgenius', topic => $$'channel:' || r.channel_id$$, "
    "columns => '{id, channel_id, user_id, content, metadata, created_at, updated_at}', soft_delete => 'deleted_at')",
)


async def test_migrations_under_load_lose_nothing_and_fail_no_write_except_by_deadlock(
    durable: str, results: Results
) -> None:
    async with scenario(durable) as run:
        await run.follow(3)
        run.write(4, Style(pause=0.005))
        migrating = await run.oracle.connect(lock_timeout="2s")
        for _ in range(rounds := by_form(1, 20)):
            for migration in MIGRATIONS:
                await run.received(20)
                await migrating.execute(f"begin; {migration}; commit")
            assert 0 == (await command("--apply-ddl", DATABASE_URL=durable))[0]
        await migrating.close()
        await run.recovered()
        assert CLEAN == await run.verdict()
        errors = dict(run.oracle.errors)
        assert {"40P01"} >= set(errors)
        results.held(
            "18",
            "migrations under load",
            f"columns added, altered, renamed, dropped; triggers dropped and recreated in one "
            f"transaction; the view of the "
            f"log replaced; `daemon --apply-ddl` again; {rounds} times",
            "0 lost; statements prepared before are prepared again; no write failed except by a deadlock",
            f"commits p99 {percentile(run.oracle.waits) * 1e3:.0f} ms, max {max(run.oracle.waits) * 1e3:.0f} ms; "
            f"{sum(errors.values())} deadlocks",
            run.n,
        )


async def test_watching_a_table_again_after_writes_that_nobody_captured_resets_its_topics(durable: str) -> None:
    async with scenario(durable) as run:
        await run.follow(1)
        run.write(2)
        await run.received(20)
        *_, again = MIGRATIONS
        unwatch, watch = again.split("; ")
        await run.oracle.execute(unwatch)
        await run.committed(20)
        await run.oracle.execute(watch)
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.unexplained_reset
    assert replace(verdict, unexplained_reset=0) == CLEAN


async def test_disabling_triggers_for_a_moment_loses_changes_and_the_checker_notices(
    durable: str, results: Results
) -> None:
    async with scenario(durable) as run:
        await run.follow(1)
        run.write(2)
        await run.received(20)
        await run.oracle.execute("alter table chatgenius.messages disable trigger user")
        await run.committed(20)
        await run.oracle.execute("alter table chatgenius.messages enable trigger user")
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.lost
    results.caught("18", "triggers disabled in one transaction and enabled in another", verdict)


async def reconnect_often(run: Scenario, rounds: int) -> list[str]:
    """Cut all connections `rounds` times; the ids of all sessions."""
    for _ in range(rounds):
        await run.received(30)
        for checker in run.checkers:
            if checker.connection is not None:
                checker.connection.transport.abort()
        await run.reconnected()
    await run.recovered()
    assert run.daemons[0].daemon
    events = run.daemons[0].daemon.events()
    return [line["data"]["session"] for line in events if line["event"] == "client_connected"]


async def test_session_ids_made_from_the_clock_repeat_when_the_clock_jumps(durable: str, results: Results) -> None:
    async with scenario(durable, mutants=["wild_clock", "session_ids_from_the_clock"]) as run:
        await run.follow(4, pause=0.05)
        run.write(3)
        sessions = await reconnect_often(run, 2)
    assert len(set(sessions)) < len(sessions)
    results.caught("21", "session_ids_from_the_clock", f"{len(sessions)} sessions with {len(set(sessions))} ids")


async def test_clock_jumps_change_no_order_and_repeat_no_id(durable: str, results: Results) -> None:
    async with scenario(durable, mutants=["wild_clock"]) as run:
        await run.follow(4, pause=0.05)
        run.write(3)
        sessions = await reconnect_often(run, by_form(3, 50))
        assert CLEAN == await run.verdict()
        made = await run.oracle.connect()
        ids = await made.fetchval(
            "select array_agg(rowcast.ulid() order by n) from generate_series(1, $1) as n",
            many := by_form(20_000, 10**6),
        )
        await made.close()
    assert len(sessions) == len(set(sessions))
    assert many == len(set(ids))
    results.held(
        "21",
        "the daemon's clock jumps",
        "`time.time` is off by up to an hour, back or forth, at each call; the clock of Postgres cannot be set here",
        "order and resuming do not depend on clocks; no session id and no ULID from SQL occurred twice",
        f"{len(sessions)} sessions, {many:,} ULIDs",
        run.n,
    )
