"""The contracts of the ports that share clients: Postgres, a gateway that asks, and what tests have in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import pytest

from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.core.ports import AckStore, PeopleStore
from daemon.core.presence import Key, People, Person
from daemon.delivery.presence import EVERY, INTERVAL
from daemon.log import sharing
from daemon.log.sharing import PgAcks, PgPeople, PgSignalRights
from daemon.postgres.connect import Pool, connect, open_pool
from daemon.relay.remote import RemoteAcks, RemotePeople, RemoteSignalRights
from tests.support.postgres import Server
from tests.support.relay import asking
from tests.support.sharing import MemoryAcks, MemoryPeople, SharedPeople

A, B = Topic("a"), Topic("b")
ADA, BOB = Key("ada", "laptop"), Key("bob", "phone")
THEN = datetime(2026, 1, 1, 12, tzinfo=UTC)
HERE = Person('{"text":"\\u00e9\\u0000"}', THEN, THEN)
LEAVING = HERE._replace(leaves=True)

Open = Callable[[str], PeopleStore]


@pytest.fixture(scope="module")
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    async with postgres.chatgenius() as database:
        sql = await connect(database, application_name="test")
        await sql.execute(
            "create table public.calls (came text [], went text []);"
            "create function public.changed(came text [], went text []) returns void language sql"
            " begin atomic insert into public.calls values (came, went); end"
        )
        pool = await open_pool(database, application_name="test", max_size=5)
        yield pool
        await pool.close()
        await sql.close()


@pytest.fixture(params=["postgres", "gateways", "memory"])
async def open_store(request: pytest.FixtureRequest, pool: Pool) -> AsyncIterator[Open]:
    """Opens the store of a process, each of the same database."""
    if request.param == "memory":
        shared = SharedPeople()
        yield lambda process: MemoryPeople(shared, process)
    else:

        def of_member(process: str) -> PgPeople:
            return PgPeople(pool, process, lambda _: "public", {"public": "public.changed"})

        ask = asking(people=of_member)
        yield of_member if request.param == "postgres" else lambda process: RemotePeople(ask, process)
        await pool.execute("truncate rowcast.people, rowcast.presence_leases, rowcast.users_present")


async def test_a_process_sees_the_people_of_others_in_the_topics_it_asks_for(open_store: Open) -> None:
    one, two = open_store("one"), open_store("two")
    assert not await one.store({(A, ADA): HERE, (B, ADA): HERE}, [])
    assert await one.store({(A, BOB): LEAVING}, [])
    assert not await two.store({}, [])
    assert {A: [{ADA: HERE, BOB: LEAVING}]} == found(await two.others([A]))
    assert {} == found(await one.others([A, B]))
    changed = HERE._replace(data='{"n":2}')
    await one.store({(A, ADA): changed}, [(A, BOB), (B, BOB)])
    assert {A: [{ADA: changed}], B: [{ADA: HERE}]} == found(await two.others([A, B]))


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_who_comes_to_one_process_has_left_the_one_that_waits_for_them(
    open_store: Open, leaves_first: bool
) -> None:
    one, two, three = open_store("one"), open_store("two"), open_store("three")
    await one.store({(A, ADA): HERE, (A, BOB): HERE}, [])
    if leaves_first:
        await one.store({(A, ADA): LEAVING}, [])
        await two.store({(A, ADA): HERE}, [])
    else:
        await two.store({(A, ADA): HERE}, [])
        await one.store({(A, ADA): LEAVING}, [])
    assert [{ADA}, {BOB}] == sorted(map(set, found(await three.others([A]))[A]), key=str)
    await two.store({}, [(A, ADA)])
    assert {A: [{BOB: HERE}]} == found(await three.others([A]))


async def test_who_comes_to_one_process_while_another_stores_that_they_leave_is_waited_for_by_neither(
    pool: Pool,
) -> None:
    one, two, three = (PgPeople(pool, process, lambda _: "", {}) for process in ("one", "two", "three"))
    await one.store({(A, ADA): HERE}, [])
    await pool.execute(
        "create function public.gate() returns trigger language plpgsql"
        " as 'begin perform pg_catalog.pg_advisory_xact_lock_shared(1); return null; end';"
        "create trigger gate after insert or update on rowcast.people execute function public.gate()"
    )
    try:
        async with pool.acquire() as holder:
            await holder.execute("select pg_advisory_lock(1)")
            stores = [
                asyncio.ensure_future(store)
                for store in (one.store({(A, ADA): LEAVING}, []), two.store({(A, ADA): HERE}, []))
            ]
            waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
            while await holder.fetchval(waiting) < len(stores):  # neither has ended before both have stored
                await asyncio.sleep(0)
            await holder.execute("select pg_advisory_unlock(1)")
        await asyncio.gather(*stores)
        assert {A: [{ADA: HERE}]} == found(await three.others([A]))
    finally:
        await pool.execute("drop trigger gate on rowcast.people; drop function public.gate()")
        await pool.execute("truncate rowcast.people, rowcast.presence_leases")


async def test_the_hooks_are_called_once_when_the_first_of_a_user_comes_and_the_last_goes(open_store: Open) -> None:
    one, two = open_store("one"), open_store("two")
    assert not await one.call_hooks()
    await one.store({(A, ADA): HERE, (B, ADA): HERE}, [])
    await two.store({(A, Key("ada", "phone")): HERE}, [])
    assert [True, True] == [await one.call_hooks(), await two.call_hooks()]
    await one.store({}, [(A, ADA), (B, ADA)])
    assert await one.call_hooks()
    await two.store({}, [(A, Key("ada", "phone"))])
    assert [False, False] == [await two.call_hooks(), await one.call_hooks()]


async def test_people_whose_lease_has_expired_or_is_lost_count_no_more(pool: Pool) -> None:
    def store(process: str) -> PgPeople:
        return PgPeople(pool, process, lambda _: "public", {"public": "public.changed"})

    one, two = store("one"), store("two")
    await one.store({(A, ADA): HERE}, [])
    assert await two.call_hooks()
    await pool.execute("update rowcast.presence_leases set expires_at = clock_timestamp() where process = 'one'")
    assert {} == await two.others([A])
    assert not await two.call_hooks()
    calls = await pool.fetch("select * from public.calls")
    assert [(["ada"], []), ([], ["ada"])] == [tuple(call) for call in calls][-2:]
    assert await one.store({}, [])  # it was only slow
    assert {A: [{ADA: HERE}]} == await two.others([A])
    await pool.execute("update rowcast.presence_leases set expires_at = clock_timestamp() - interval '1 hour'")
    await two.store({}, [])  # a process that begins forgets those that have ended
    assert not await one.store({}, [])
    assert {} == await two.others([A])


async def test_a_hook_that_hangs_is_given_up_before_the_lease_has_to_be_renewed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sharing.HOOK_TIMEOUT + EVERY + INTERVAL < sharing.LEASE.total_seconds()
    monkeypatch.setattr(sharing, "HOOK_TIMEOUT", 0.1)
    store = PgPeople(pool, "one", lambda _: "public", {"public": "public.changed"})
    async with pool.acquire() as other, other.transaction():
        await other.execute("select pg_advisory_xact_lock($1)", sharing.HOOKS_LOCK)
        with pytest.raises(LogUnavailable):
            await store.call_hooks()
    await store.call_hooks()


async def test_the_function_of_a_schema_says_who_may_signal_there(pool: Pool) -> None:
    await pool.execute(
        "create or replace function public.may_signal(user_id text, topic text) returns boolean"
        " language sql as $$ select user_id = 'ada' and 1 / (case topic when 'a' then 1 else 0 end) = 1 $$"
    )
    of_member = PgSignalRights(pool, {A: "public", B: "public"}.get, {"public": "public.may_signal"})
    for rights in (of_member, RemoteSignalRights(asking(signal_rights=of_member), of_member.concerns)):
        assert [True, False] == [rights.concerns(A), rights.concerns(Topic("c"))]
        assert [True, False] == [await rights.may_signal(user, A) for user in ("ada", "bob")]
        with pytest.raises(GrantsUnavailable):
            await rights.may_signal("ada", B)


@pytest.fixture(params=["postgres", "a gateway", "memory"])
def acks(request: pytest.FixtureRequest, pool: Pool) -> AckStore:
    if request.param == "memory":
        return MemoryAcks()
    return PgAcks(pool, {}) if request.param == "postgres" else RemoteAcks(asking(acks=PgAcks(pool, {})))


async def test_the_last_position_of_each_device_is_stored(acks: AckStore) -> None:
    await acks.store({ADA: Position("e", Seq(7)), BOB: Position("e", Seq(8))})
    await acks.store({ADA: Position("d", Seq(3))})
    assert [Position("d", Seq(3)), Position("e", Seq(8))] == [await acks.stored(ADA), await acks.stored(BOB)]
    assert await acks.stored(Key("ada", "phone")) is None


async def test_what_a_database_cannot_hold_does_not_keep_others_from_being_stored(pool: Pool) -> None:
    acks = PgAcks(pool, {})
    position = Position("e", Seq(7))
    await acks.store({Key("a\x00", "d"): position, Key("kim", "d"): position})
    await acks.store({Key("a\x00", "d"): position})
    assert position == await acks.stored(Key("kim", "d"))
    for number in range(40):
        await acks.store({Key("kim", str(number)): position})
    assert 32 == await pool.fetchval("select count(*) from rowcast.acks where user_id = 'kim'")
    assert position == await acks.stored(Key("kim", "39"))


def found(others: dict[Topic, list[People]]) -> dict[Topic, list[People]]:
    """Without topics and processes that have nobody."""
    return {topic: people for topic, processes in others.items() if (people := list(filter(None, processes)))}
