"""The ports of a gateway: what a member answers arrives, and whatever goes wrong is what the port promises."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import UTC, datetime
from functools import partial

import pytest

from daemon.core.batch import LogBatch
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogTruncated, LogUnavailable, RowcastError, SnapshotTooLarge
from daemon.core.filters import Asked, view
from daemon.core.ports import Batch
from daemon.core.presence import Key, Person
from daemon.core.snapshot import Wanted
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.snapshots import checked
from daemon.log.columns import PgColumns
from daemon.log.grants import PgGrants
from daemon.log.own_tables import PgOwnTableReader
from daemon.log.rows import PgRowReader
from daemon.log.users import PgUsers
from daemon.packs import Pack, Row
from daemon.postgres.connect import Pool, connect, open_pool
from daemon.relay import codec, port_questions, service
from daemon.relay.codec import Following
from daemon.relay.errors import AnswerError, RelayUnavailable
from daemon.relay.port_questions import MAX_ASKED, Ask
from daemon.relay.remote import (
    MAX_STORED,
    RemoteAcks,
    RemoteColumns,
    RemoteGrants,
    RemoteLogReader,
    RemoteOwnTables,
    RemotePeople,
    RemoteRows,
    RemoteSignalRights,
    RemoteUsers,
)
from tests.support.log import leader, until_numbered
from tests.support.postgres import Server
from tests.support.relay import HERE, Absent, asking, epoch, here
from tests.support.sharing import MemoryAcks, MemoryPeople, SharedPeople

A = Topic("row:1")
ADA = Key("ada", "laptop")
CHANGE = Change(Seq(8), "1", "", "app", "rows", A, Kind.INSERT, '{"id":1}', '{"id":1}')


class Painted(Row):
    id: int
    color: str


CALLS: dict[str, tuple[Callable[[Ask], Awaitable[object]], type[RowcastError]]] = {
    "head": (lambda ask: RemoteLogReader(ask, here).head(), LogUnavailable),
    "read": (lambda ask: RemoteLogReader(ask, here).read(Seq(0), 1), LogUnavailable),
    "read_topics": (lambda ask: RemoteLogReader(ask, here).read_topics([A], Seq(0), Seq(1), 1), LogUnavailable),
    "continuity": (lambda ask: RemoteLogReader(ask, here).continuity(HERE), LogUnavailable),
    "batches": (lambda ask: RemoteLogReader(ask, here).batches(HERE), LogUnavailable),
    "contents": (lambda ask: RemoteLogReader(ask, here).contents(HERE, Seq(8), [1]), LogUnavailable),
    "rights": (lambda ask: RemoteGrants(ask, epoch).readable_from("ada", A), GrantsUnavailable),
    "slow_rights": (lambda ask: RemoteGrants(ask, epoch, str).readable_from("ada", A), GrantsUnavailable),
    "rows": (lambda ask: RemoteRows(ask).read(Wanted(A, None)), LogUnavailable),
    "columns": (lambda ask: RemoteColumns(ask).columns(A), LogUnavailable),
    "own_tables": (lambda ask: RemoteOwnTables(ask).read(), LogUnavailable),
    "store_people": (lambda ask: RemotePeople(ask, "p").store({}, []), LogUnavailable),
    "others": (lambda ask: RemotePeople(ask, "p").others([A]), LogUnavailable),
    "call_hooks": (lambda ask: RemotePeople(ask, "p").call_hooks(), LogUnavailable),
    "store_acks": (lambda ask: RemoteAcks(ask).store({ADA: HERE}), LogUnavailable),
    "stored_acks": (lambda ask: RemoteAcks(ask).stored(ADA), LogUnavailable),
    "may_signal": (lambda ask: RemoteSignalRights(ask, lambda _: True).may_signal("ada", A), GrantsUnavailable),
    "users": (lambda ask: RemoteUsers(ask).user_of("ada"), GrantsUnavailable),
}
OTHER_ERRORS = {"log_truncated": "[]", "snapshot_too_large": "[1,2]", "log_unavailable": '["x"]', "more": "x"}


@pytest.fixture(scope="module")
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    """A table that a pack serves, with a right that was given; and one that is served without a pack."""
    async with postgres.chatgenius() as database:
        pool = await open_pool(database, application_name="test", max_size=5)
        sql = await connect(database, application_name="test")
        await sql.execute("""
            create schema app;
            create table app.rows (id integer primary key, color text not null);
            select rowcast.watch(
                'app.rows', $$'row:' || r.id$$, '{id,color}', rows => 'true', revokes => $$'{}'::jsonb$$);
            create function app.may_read(user_id text, topic text) returns boolean language plpgsql as $$
            begin
                if topic = 'row:0' then raise exception 'a fault of the pack'; end if;
                return user_id = 'ada';
            end $$;
            create table public.orders (id integer primary key, total numeric);
            select rowcast.serve('public.orders', $$'orders:' || r.id$$, 'true');
        """)
        async with leader(database, pool):
            await sql.execute("insert into app.rows select n, 'caf\u00e9 \U0001f600' from generate_series(1, 3) as n")
            await until_numbered(pool)
        await sql.close()
        yield pool
        await pool.close()


def test_each_question_that_there_is_is_tested() -> None:
    assert port_questions.TIMEOUTS.keys() == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
async def test_whatever_goes_wrong_is_what_the_port_promises(name: str) -> None:
    call, promised = CALLS[name]
    errors: list[Exception] = [RelayUnavailable("nobody"), AnswerError("unknown_question", "x"), AnswerError("y", "")]
    wrongs: list[bytes | Exception] = [b"", b"garbage", b"\1\0\0\0\1!", *errors]
    for wrong in wrongs:

        async def ask(question: str, payload: bytes, wrong: bytes | Exception = wrong) -> bytes:
            assert name == question
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

        with pytest.raises(promised):
            await call(ask)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", OTHER_ERRORS)
async def test_no_error_arrives_that_the_port_does_not_promise(name: str, code: str) -> None:
    async def ask(question: str, payload: bytes) -> bytes:
        raise AnswerError(code, OTHER_ERRORS[code])

    call, promised = CALLS[name]
    also = {
        "read_topics": LogTruncated,
        "batches": LogTruncated,
        "contents": LogTruncated,
        "rows": SnapshotTooLarge,
    }.get(name, promised)
    with pytest.raises((promised, also)):
        await call(ask)


@pytest.mark.parametrize(
    ("name", "error"),
    [("head", LogUnavailable("r\u00e9ason")), ("read_topics", LogTruncated()), ("rows", SnapshotTooLarge(7, 9))],
)
async def test_an_error_of_the_member_arrives_with_its_arguments(name: str, error: RowcastError) -> None:
    class Broken:
        async def fail(self, *_: object) -> object:
            raise error

        head = read_topics = read = continuity = fail

    call, _ = CALLS[name]
    with pytest.raises(type(error)) as raised:
        await call(asking(log_reader=Broken(), rows=Broken()))
    assert vars(error) == vars(raised.value)


@pytest.mark.parametrize(
    ("question", "payload", "code"),
    [("truth", b"", "unknown_question"), ("head", b"", "bad_message"), ("rights", b"\1\0\0\0\2{}", "bad_message")],
)
async def test_a_member_refuses_what_it_does_not_understand(question: str, payload: bytes, code: str) -> None:
    with pytest.raises(AnswerError) as refused:
        await asking()(question, payload)
    assert code == refused.value.code


async def test_a_gateway_gets_the_answers_that_a_member_gets(pool: Pool) -> None:
    def schema_of(topic: Topic) -> str | None:
        return {"row": "app", "orders": "rowcast"}.get(topic.partition(":")[0])

    grants, rows = PgGrants(pool, schema_of), PgRowReader(pool, schema_of, 100, 10**6)
    router = PackRouter({"app": Pack("app", {"rows": Painted}, (r"row:\d+",))})
    columns, own_tables = PgColumns(pool, schema_of), PgOwnTableReader(pool)
    users = PgUsers(pool, "select u as subject, upper(u) as user_id from unnest($1::text []) as u where u <> 'bob'")
    parts = {"grants": grants, "rows": rows, "columns": columns, "own_tables": own_tables, "user_of": users.user_of}
    ask = asking(checked=lambda found: checked(found, router), **parts)
    remote_grants, remote_users = RemoteGrants(ask, epoch), RemoteUsers(ask)
    lookups = [("ada", A), ("bob", A), ("ada", Topic("nothing:1")), ("a\0", A)]
    expected = [await grants.readable_from(*lookup) for lookup in lookups]
    assert expected == await asyncio.gather(*(remote_grants.readable_from(*lookup) for lookup in lookups))
    assert (expected[0] or 0) > 0
    with pytest.raises(GrantsUnavailable, match="P0001"):
        await remote_grants.readable_from("ada", Topic("row:0"))
    assert ["ADA", None] == await asyncio.gather(*map(remote_users.user_of, ("ada", "bob")))
    assert await own_tables.read() == await RemoteOwnTables(ask).read()
    topics = [A, Topic("row:2"), Topic("orders:1"), Topic("nothing:1")]
    remote_columns = RemoteColumns(ask)
    assert [await columns.columns(topic) for topic in topics] == await asyncio.gather(
        *map(remote_columns.columns, topics)
    )
    seen = view(Asked({"rows": {"color": {"like": "%\U0001f600"}}}, None), await columns.columns(A))
    unseen = view(Asked({"rows": {"color": {"eq": "blue"}}}, None), await columns.columns(A))
    for wanted, count in ((Wanted(A, None), 1), (Wanted(A, 1, seen), 1), (Wanted(A, None, unseen), 0)):
        found = await RemoteRows(ask).read(wanted)
        assert await checked(await rows.read(wanted), router) == found
        assert count == len(found.rows)


async def test_a_topic_with_too_many_rows_is_refused_with_the_limit(pool: Pool) -> None:
    ask = asking(rows=PgRowReader(pool, lambda _: "app", 0, 10**6))
    with pytest.raises(SnapshotTooLarge) as refused:
        await RemoteRows(ask).read(Wanted(A, None))
    assert (0, 10**6) == (refused.value.rows, refused.value.size)


class Rights:
    """The rights of a member, who answers about `slow` when `answers` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        if user == "slow":
            await self.answers.wait()
        return Seq(len(user))


class Counting:
    """Counts what a member is asked."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.asked: list[tuple[str, bytes]] = []

    async def __call__(self, question: str, payload: bytes) -> bytes:
        self.asked.append((question, payload))
        return await self._ask(question, payload)


async def test_what_many_ask_in_one_turn_takes_few_questions() -> None:
    ask = Counting(asking(grants=Rights()))
    grants = RemoteGrants(ask, epoch)
    names = ["n" * number for number in range(3 * MAX_ASKED - 50)]
    assert list(range(len(names))) == await asyncio.gather(*(grants.readable_from(name, A) for name in names))
    assert [100, 100, 50] == [len(codec.RIGHTS.decode(payload)[1]) for _, payload in ask.asked]
    crowd = [asyncio.create_task(grants.readable_from(name, A)) for name in names[:40]]
    await asyncio.sleep(0)  # all have asked
    for lookup in crowd[::2]:
        lookup.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    assert [*range(1, 40, 2)] == [lookup.result() for lookup in crowd[1::2]]
    assert [20] == [len(codec.RIGHTS.decode(payload)[1]) for _, payload in ask.asked[3:]]


async def test_a_right_that_takes_long_keeps_no_other_waiting_and_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "SOON", 0.01)
    rights = Rights()
    ask = Counting(asking(grants=rights))
    grants = RemoteGrants(ask, epoch)
    slow = asyncio.create_task(grants.readable_from("slow", A))
    assert 3 == await grants.readable_from("ada", A)
    assert not slow.done()
    while not ask.asked[1:]:
        await asyncio.sleep(0)
    assert 3 == await grants.readable_from("bob", A)
    rights.answers.set()
    assert 4 == await slow
    assert ["rights", "slow_rights", "rights"] == [question for question, _ in ask.asked]


async def test_a_slow_right_to_a_table_keeps_only_the_same_table_waiting() -> None:
    rights = Rights()
    ask = Counting(asking(grants=rights))
    grants = RemoteGrants(ask, epoch, {Topic("slow:1"): "public.slow", Topic("fast:1"): "public.fast"}.get)
    slow = [asyncio.create_task(grants.readable_from("slow", Topic("slow:1")))]
    while not ask.asked:
        await asyncio.sleep(0)
    slow += [asyncio.create_task(grants.readable_from("slow", Topic("slow:1"))) for _ in range(9)]
    assert [3, 3] == [await grants.readable_from("ada", Topic(topic)) for topic in ("fast:1", "row:1")]
    assert not any(lookup.done() for lookup in slow)
    rights.answers.set()
    assert [4] * 10 == await asyncio.gather(*slow)
    assert ["slow_rights", "slow_rights", "rights", "slow_rights"] == [question for question, _ in ask.asked]


async def test_a_read_of_which_nothing_may_be_sent_says_how_far_it_went() -> None:
    class Log(Absent):
        async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
            return Batch([CHANGE], more=True)

    def deliverable(batch: Batch) -> list[Change]:
        return []

    log = RemoteLogReader(asking(log_reader=Log(), deliverable=deliverable), here)
    found = await log.read_topics([A], Seq(0), Seq(9), 1)
    assert ([], True, True, 8) == (list(found), found.more, found.validated, found.reached)


async def test_what_follows_a_position_comes_in_answers_of_limited_size() -> None:
    large = CHANGE._replace(record=f'{{"id":1,"text":"{"x" * 2**18}"}}')
    batches = [LogBatch("e", Seq(seq), Seq(seq + 1), [large._replace(seq=Seq(seq + 1))]) for seq in range(7, 11)]

    async def following(after: Position) -> Following:
        found = [batch for batch in batches if batch.after >= after.seq]
        return Following(Position("e", Seq(11)), [codec.LOG_BATCH.encode(batch) for batch in found])

    log = RemoteLogReader(asking(batches=following), here)
    place, found, answers = HERE, list[LogBatch](), 0
    while (answer := await log.batches(place))[1]:
        assert Position("e", Seq(11)) == answer[0]
        found += answer[1]
        place, answers = Position("e", found[-1].upto), answers + 1
    assert [*map(codec.LOG_BATCH.encode, batches)] == [*map(codec.LOG_BATCH.encode, found)]
    assert 2 == answers


async def test_a_crowd_is_stored_in_several_questions() -> None:
    shared, acks = SharedPeople(), MemoryAcks()
    ask = Counting(asking(people=lambda process: MemoryPeople(shared, process), acks=acks))
    keys = [Key("ada", str(number)) for number in range(2 * MAX_STORED + 1)]
    await RemoteAcks(ask).store(dict.fromkeys(keys, HERE))
    assert dict.fromkeys(keys, HERE) == acks.acks
    assert 3 == len(ask.asked)
    people = RemotePeople(ask, "here")
    somebody = Person("{}", datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC))
    assert not await people.store({(A, key): somebody for key in keys}, [])
    assert await people.store({}, [])
    elsewhere = RemotePeople(ask, "there")
    others = await elsewhere.others([A, *(Topic(f"row:{number}") for number in range(2, 2 * MAX_STORED))])
    assert set(keys) == set(others[A][0])
    assert await people.store({}, [(A, key) for key in keys])
    assert not any((await elsewhere.others([A]))[A])


@pytest.mark.parametrize("name", ["read", "read_topics", "rights", "slow_rights"])
@pytest.mark.parametrize("moves", ["before", "meanwhile"])
async def test_numbers_of_another_epoch_are_never_answered(name: str, moves: str) -> None:
    epochs = iter(["e", "f"] if moves == "meanwhile" else ["f"])

    class Ports(Absent):
        async def read(self, *_: object) -> Batch:
            return Batch([CHANGE])

        read_topics = read

        async def readable_from(self, *_: object) -> Seq:
            return Seq(8)

    def position() -> Position:
        return Position(next(epochs), Seq(9))

    call, promised = CALLS[name]
    with pytest.raises(promised, match="another epoch"):
        await call(asking(log_reader=Ports(), grants=Ports(), deliverable=list, position=position))


async def test_a_member_that_is_behind_does_not_answer_what_it_may_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(seq: Seq) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(service, "MAX_BEHIND", 0.01)
    with pytest.raises(LogUnavailable, match="behind"):
        await RemoteLogReader(asking(wait_until_delivered=never), here).read_topics([A], Seq(0), Seq(9), 1)


async def test_a_member_that_is_behind_does_not_say_that_a_position_is_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "MAX_BEHIND", 0.01)
    reached = list[Seq]()

    class Log(Absent):
        async def continuity(self, since: Position) -> str | None:
            return "epoch" if since.epoch == "e" else None

    async def until(seq: Seq) -> None:
        if seq > HERE.seq:
            await asyncio.Event().wait()
        reached.append(seq)

    reader = RemoteLogReader(asking(log_reader=Log(), wait_until_delivered=until), here)
    assert "epoch" == await reader.continuity(HERE)
    for upto in (Position("e", Seq(8)), Position("f", Seq(1))):
        with pytest.raises(LogUnavailable, match=r"behind|another epoch"):
            await reader.continuity(HERE, upto)
    assert await reader.continuity(Position("f", Seq(1)), Position("f", Seq(9))) is None
    assert [HERE.seq] == reached


async def test_every_question_fits_into_one_message_however_long_its_texts_are() -> None:
    sizes = list[int]()

    async def ask(question: str, payload: bytes) -> bytes:
        sizes.append(len(payload))
        raise RelayUnavailable("counted")

    wide, now = "\U0001f600" * 128, datetime(2026, 1, 1, tzinfo=UTC)
    somebody, keys = Person('"' * 1024, now, now), [Key(wide, f"{wide[:60]}{number}") for number in range(200)]
    grants, users = RemoteGrants(ask, epoch), RemoteUsers(ask)
    calls = [RemotePeople(ask, "p").store({(Topic(wide), key): somebody for key in keys}, [])]
    calls += [RemotePeople(ask, "p").store({}, [(Topic(wide), key) for key in keys])]
    await asyncio.gather(
        *calls,
        RemoteAcks(ask).store(dict.fromkeys(keys, HERE)),
        RemotePeople(ask, "p").others([Topic(f"{wide[:100]}{number}") for number in range(200)]),
        *(grants.readable_from(wide, Topic(wide)) for _ in range(200)),
        *(users.user_of(wide * 2) for _ in range(200)),
        return_exceptions=True,
    )
    assert 8 == len(sizes)
    assert max(sizes) < 256 * 1024


AGAIN: dict[str, Callable[[Ask], Callable[[], Awaitable[object]]]] = {
    "rights": lambda ask: partial(RemoteGrants(ask, epoch).readable_from, "ada", A),
    "rights of an own table": lambda ask: partial(RemoteGrants(ask, epoch, str).readable_from, "ada", A),
    "columns": lambda ask: partial(RemoteColumns(ask).columns, A),
    "users": lambda ask: partial(RemoteUsers(ask).user_of, "ada"),
}


@pytest.mark.parametrize("name", AGAIN)
async def test_who_asks_again_as_soon_as_there_is_no_answer_waits_no_longer(name: str) -> None:
    async def nobody(*_: object) -> bytes:
        raise RelayUnavailable("there is nobody")

    call = AGAIN[name](nobody)
    for _ in range(2):
        with pytest.raises((GrantsUnavailable, LogUnavailable), match="there is nobody"):
            async with asyncio.timeout(10):
                await call()


async def test_who_asks_about_an_own_table_again_as_soon_as_there_is_an_answer_gets_one() -> None:
    class Granted(Absent):
        async def readable_from(self, *_: object) -> Seq:
            return Seq(3)

    grants = RemoteGrants(asking(grants=Granted()), epoch, str)
    async with asyncio.timeout(10):
        assert [3, 3] == [await grants.readable_from("ada", A) for _ in range(2)]


async def test_who_looks_up_a_user_again_as_soon_as_there_is_an_answer_gets_one(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.log.users.MAX_CONCURRENT_QUERIES", 1)
    users = PgUsers(pool, "select u as subject, upper(u) as user_id from unnest($1::text []) as u")
    async with asyncio.timeout(10):
        assert ["ADA", "BOB"] == [await users.user_of(subject) for subject in ("ada", "bob")]
