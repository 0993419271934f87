"""Contents that travel by topic: who gets what, and that nobody misses any of it, with real servers."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from unittest.mock import Mock

import pytest

from daemon.core.batch import Beat, Contents, LogBatch, hash_of
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.epochs import Epochs
from daemon.core.errors import LogTruncated
from daemon.delivery.contents import LINGER, MAX_AT_HAND, MAX_SWEPT, AtHand, Interest
from daemon.delivery.feed import Feed
from daemon.delivery.log_cache import LogCache
from daemon.postgres.connect import Connection
from daemon.relay import codec
from daemon.relay import link as links
from daemon.relay.contents import SLICE, ContentSubscriptions
from daemon.relay.link import Link
from daemon.relay.publisher import MAX_HELD, MAX_MANIFEST, Publisher
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, get
from tests.support.gateways import contents, follow, gateway, member, read
from tests.support.nats import NatsServer, running_cluster, running_link, running_nats, until_cut_off

BY_TOPIC = {"ROWCAST_NATS_CONTENT": "topic"}
A, B = Topic("t:a"), Topic("t:b")


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


def change(seq: int, topic: Topic = A, kind: Kind = Kind.INSERT, record: str = "{}") -> Change:
    return Change(Seq(seq), str(seq), "", "app", "rows", topic, kind, f'{{"id":{seq}}}', record)


def batch(*changes: Change, gone: tuple[()] | None = ()) -> LogBatch:
    return LogBatch("e", Seq(changes[0].seq - 1), changes[-1].seq, changes, gone=gone)


async def counted(node: Daemon, result: str) -> float:
    """How many contents have had this result at a node."""
    lines = (await get(f"{node.http}/metrics"))[1].splitlines()
    name = f'rowcast_relay_contents_total{{result="{result}"}} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


async def test_a_gateway_gets_the_contents_of_topics_that_its_clients_follow(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with (
        member(database, nats.url, prefix, **BY_TOPIC) as one,
        gateway(nats.url, prefix) as two,
        gateway(nats.url, prefix) as three,
        AsyncExitStack() as stack,
    ):
        client = await follow(stack, two, chat)
        for number in range(10):
            await chat.say("unfollowed", chat.other)
            await chat.say(str(number))
            assert [str(number)] == await read(client, str(number))
        for node in (one, two, three):
            await chat.settled(node)
        arrived, asked = await counted(two, "arrived"), await counted(two, "asked")
        assert 10 <= arrived + asked
        assert 8 <= arrived <= 13, "only the first was asked for; the last ones are those of settled()"
        others = await counted(three, "arrived") + await counted(three, "asked")
        assert others <= 1, "the client of settled() may have had one"
        assert await counted(one, "sent") >= 20


async def test_clients_that_join_while_others_write_miss_nothing(database: str, chat: Chat, prefix: str) -> None:
    """The member and the gateway use different servers of a cluster, where subscriptions take effect late."""
    channels = [
        await chat.sql.fetchval(
            "insert into chatgenius.channels (name) values ($1) returning id", f"channel {number}"
        )
        for number in range(20)
    ]
    for channel in channels:
        await chat.sql.execute(
            "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", channel, chat.ada
        )
    async with running_cluster() as servers, AsyncExitStack() as stack:
        await stack.enter_async_context(member(database, servers[0].url, prefix, **BY_TOPIC))
        gate = await stack.enter_async_context(gateway(servers[1].url, prefix))
        is_writing = True

        async def write() -> int:
            number = 0
            while is_writing:
                number += 1
                await chat.sql.execute(
                    """insert into chatgenius.messages (channel_id, user_id, content)
                       select channel, $2, $3 from unnest($1::text[]) as channel""",
                    channels,
                    chat.ada,
                    str(number),
                )
            return number

        async def join(channel: str) -> tuple[Client, list[str]]:
            """A client, and what it has had when it had something."""
            client = await stack.enter_async_context(gate.client(chat.ada))
            assert "subscribed" == (await client.subscribe(f"channel:{channel}"))["op"]
            return client, contents((await client.next())["changes"])

        writing = asyncio.create_task(write())
        joined = [await join(channel) for channel in channels for _ in range(2)]
        is_writing = False
        last = await writing
        for client, first in joined:
            found = [*first, *(await read(client, str(last)) if str(last) not in first else [])]
            assert [*map(str, range(int(first[0]), last + 1))] == found


async def test_a_client_resumes_at_a_gateway_that_never_had_its_topic(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with member(database, nats.url, prefix, **BY_TOPIC), gateway(nats.url, prefix) as two:
        async with AsyncExitStack() as stack:
            client = await follow(stack, two, chat)
            await chat.say("a")
            since = (await client.until("changes"))[-1]["pos"]
        await chat.say("other", chat.other)
        for content in ("b", "c"):
            await chat.say(content)
        await chat.settled(two)
        async with gateway(nats.url, prefix) as three, AsyncExitStack() as stack:
            await chat.say("d")
            await chat.settled(three)
            for node in (two, three):
                client = await follow(stack, node, chat, since)
                assert ["b", "c", "d"] == await read(client, "d")


async def test_a_leader_may_publish_otherwise_than_the_one_before(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with AsyncExitStack() as stack:
        async with member(database, nats.url, prefix):
            gate = await stack.enter_async_context(gateway(nats.url, prefix))
            client = await follow(stack, gate, chat)
        said, by_topic = 0, 0.0
        for content in ("topic", "inline", "topic"):
            async with member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content):
                before, begun = by_topic, said
                while said < begun + 3 or (content == "topic" and by_topic == before):
                    said += 1
                    await chat.say(str(said))
                    assert [str(said)] == await read(client, str(said))
                    by_topic = await counted(gate, "arrived") + await counted(gate, "asked")


# Interest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


ABSENT = batch(change(8))._replace(absent={hash_of(A): 1})


def test_a_topic_stays_wanted_for_a_while_after_its_last_follower() -> None:
    clock, changed = Clock(), list[int]()
    interest = Interest(clock)
    interest.on_change = changed.extend
    interest.record(ABSENT)
    interest.follow(A)
    interest.unfollow(A)
    clock.now = LINGER - 1
    interest.sweep()
    assert interest.is_wanted(hash_of(A))
    interest.follow(A)
    interest.unfollow(A)
    clock.now = LINGER + 1
    interest.sweep()
    assert interest.is_wanted(hash_of(A))
    clock.now = 2 * LINGER
    interest.sweep()
    assert not interest.is_wanted(hash_of(A))
    assert [hash_of(A)] * 2 == changed


def test_topics_of_one_hash_are_wanted_until_the_last_of_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.delivery.contents.hash_of", lambda _: 7)
    clock = Clock()
    interest = Interest(clock)
    interest.record(ABSENT)
    interest.follow(A)
    interest.follow(B)
    interest.unfollow(A)
    clock.now = 2 * LINGER
    interest.sweep()
    assert interest.is_wanted(7)
    interest.unfollow(B)
    clock.now = 4 * LINGER
    interest.sweep()
    assert not interest.is_wanted(7)


def test_nothing_has_to_be_subscribed_to_while_batches_are_whole() -> None:
    clock, changed = Clock(), list[int]()
    interest = Interest(clock)
    interest.on_change = changed.extend
    interest.follow(A)
    assert not interest.is_wanted(hash_of(A))
    interest.record(ABSENT)
    assert interest.is_wanted(hash_of(A))
    interest.record(batch(change(9)))
    assert interest.is_wanted(hash_of(A))
    clock.now = LINGER + 1
    interest.record(batch(change(10)))
    assert not interest.is_wanted(hash_of(A))
    assert [hash_of(A)] * 3 == changed


def test_many_topics_that_have_lingered_are_given_up_in_portions() -> None:
    clock = Clock()
    interest = Interest(clock)
    interest.record(ABSENT)
    topics = [Topic(f"t:{number}") for number in range(MAX_SWEPT + 1)]
    for topic in topics:
        interest.follow(topic)
        interest.unfollow(topic)
    clock.now = 2 * LINGER
    interest.sweep()
    assert 1 == sum(interest.is_wanted(hash_of(topic)) for topic in topics)
    interest.sweep()
    assert 0 == sum(interest.is_wanted(hash_of(topic)) for topic in topics)


class Asked:
    """A log that notes which topics were asked about."""

    def __init__(self) -> None:
        self.after: list[int] = []

    async def read_topics(self, topics: object, after: Seq, upto: Seq, limit: int) -> list[Change]:
        self.after.append(after)
        return []


async def test_a_replay_is_read_from_memory_only_where_everything_has_been_here() -> None:
    log, interest = Asked(), Interest(Clock())
    cache = LogCache(log, 2**20)  # type: ignore[arg-type]
    cache.covers = interest.covers
    cache.restart(Position("e", Seq(7)))
    interest.restart(Position("e", Seq(7)))

    def publish(published: LogBatch) -> None:
        interest.publish(published)
        cache.add(published)

    publish(batch(change(8)))
    assert [8] == [one.seq for one in await cache.read_topics([A], Seq(7), Seq(8), 9)]
    publish(batch(change(9, B))._replace(changes=(), absent={hash_of(B): 1}))
    await cache.read_topics([A], Seq(8), Seq(9), 9)
    assert [8] == log.after, "nobody followed it while batches came without contents"
    publish(batch(change(10))._replace(absent={hash_of(B): 1}))
    assert [10] == [one.seq for one in await cache.read_topics([A, Topic("*app")], Seq(9), Seq(10), 9)]
    assert [8] == log.after, "it is wanted since it was first asked about"
    await cache.read_topics([A, B], Seq(9), Seq(10), 9)
    assert [8, 9] == log.after


def test_contents_that_arrive_are_dropped_while_too_much_waits() -> None:
    at_hand, large = AtHand(), "x" * (MAX_AT_HAND // 2)
    kept = [
        at_hand.arrive(Contents("e", Seq(seq - 1), Seq(seq), [change(seq, record=large)])) for seq in range(8, 12)
    ]  # fmt: skip
    assert [True, True, False, False] == kept
    at_hand.forget(Position("e", Seq(8)))
    assert at_hand.arrive(Contents("e", Seq(11), Seq(12), [change(12)]))


def test_contents_of_a_batch_that_ends_alike_but_begins_elsewhere_are_not_taken_for_its_own() -> None:
    at_hand = AtHand()
    assert at_hand.arrive(Contents("e", Seq(6), Seq(7), [change(7)]))
    longer = LogBatch("e", Seq(5), Seq(7), absent={hash_of(change(7).topic): 2})
    assert not at_hand.of(longer)
    assert at_hand.of(longer._replace(after=Seq(6)))


def test_contents_of_another_epoch_take_no_room_from_those_of_ones_own() -> None:
    epochs, live = Epochs(), Mock(position=Position("e", Seq(0)))
    epochs.followed = "e"
    feed = Feed(Mock(), live, Mock(), Interest(), epochs)
    for seq in range(1, 4):
        large = change(seq, record="x" * (MAX_AT_HAND // 2))
        feed.receive_contents(Contents("other", Seq(seq - 1), Seq(seq), [large]))
    feed.receive_contents(Contents("e", Seq(0), Seq(1), [change(1)]))
    assert feed._at_hand.of(batch(change(1)))


# What the leader sends, and what members hold


@asynccontextmanager
async def publishing(nats: NatsServer, prefix: str) -> AsyncIterator[tuple[Publisher, list[tuple[str, bytes]]]]:
    """A leader that publishes by topic, at 7; and what arrives of it, with `log` or `t`."""
    got = list[tuple[str, bytes]]()
    async with running_link(nats.url, prefix, "m") as link, running_link(nats.url, prefix, "g") as other:
        await asyncio.gather(link.connected.wait(), other.connected.wait())
        other.subscribe("t.*", lambda data: got.append(("t", data)))
        other.subscribe("log", lambda data: got.append(("log", data)))
        while not got:
            link.publish("log", b"begin")
            await asyncio.sleep(0.01)
        publisher = Publisher(
            link,
            Asked(),  # type: ignore[arg-type]
            lambda: Beat("e", Seq(7), 0.0, "m", ""),
            lambda: True,
            lambda after, changes: batch(*changes),
            by_topic=True,
        )
        publisher.restart(Position("e", Seq(7)))
        yield publisher, got


async def until_arrived(got: list[tuple[str, bytes]], upto: int) -> tuple[list[Contents], LogBatch]:
    """The contents that have arrived before the batch that ends there, and this batch."""
    while (place := place_of(got, upto)) is None:
        await asyncio.sleep(0.001)
    outline = codec.MANIFEST.decode(got[place][1])
    assert isinstance(outline, LogBatch)
    return [codec.CONTENTS.decode(part) for kind, part in got[:place] if kind == "t"], outline


def place_of(got: list[tuple[str, bytes]], upto: int) -> int | None:
    for place, (kind, data) in enumerate(got):
        if kind == "log" and data != b"begin" and codec.MANIFEST.decode(data).upto == upto:
            return place
    return None


async def test_contents_come_before_their_batch_and_doubts_stay_in_it(nats: NatsServer, prefix: str) -> None:
    async with publishing(nats, prefix) as (publisher, got):
        publisher.publish(batch(change(8), change(9, B), change(10, kind=Kind.TRUNCATE), change(11)))
        parts, outline = await until_arrived(got, 11)
        assert [[8, 11], [9]] == [[one.seq for one in part.changes] for part in parts]
        assert [10] == [one.seq for one in outline.changes]
        assert [hash_of(A), hash_of(B)] == [*outline.absent]


async def test_topics_of_one_hash_travel_together(
    nats: NatsServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.core.batch.hash_of", lambda _: 7)
    async with publishing(nats, prefix) as (publisher, got):
        publisher.publish(batch(change(8), change(9, B)))
        [part], _ = await until_arrived(got, 9)
        assert [A, B] == [one.topic for one in part.changes]


async def test_only_contents_that_are_too_large_have_to_be_asked_for(nats: NatsServer, prefix: str) -> None:
    async with publishing(nats, prefix) as (publisher, got):
        publisher.publish(batch(change(8, record="x" * MAX_MANIFEST), change(9, B)))
        parts, outline = await until_arrived(got, 9)
        assert [[B]] == [[one.topic for one in part.changes] for part in parts]
        assert outline.absent[hash_of(A)] >= MAX_MANIFEST
        assert [8] == [one.seq for one in publisher.contents(Position("e", Seq(7)), Seq(9), {hash_of(A)})]


async def test_members_answer_for_contents_that_they_hold_whole(nats: NatsServer, prefix: str) -> None:
    async with publishing(nats, prefix) as (publisher, _):
        publisher.publish(batch(change(8), change(9, B)))
        publisher.publish(batch(change(10), change(11)))

        def held(after: int, upto: int, *topics: Topic) -> list[int]:
            found = publisher.contents(Position("e", Seq(after)), Seq(upto), set(map(hash_of, topics)))
            return [one.seq for one in found]

        assert [8, 10, 11] == held(7, 11, A)
        assert [8, 9, 10] == held(7, 10, A, B)
        assert [9] == held(8, 11, B)
        publisher.publish(batch(change(12, kind=Kind.LIMIT), gone=None))
        assert [10, 11] == held(9, 11, A)
        for after, epoch in ((9, "e"), (6, "e"), (9, "f")):  # a limit, before what is held, another epoch
            with pytest.raises(LogTruncated):
                publisher.contents(Position(epoch, Seq(after)), Seq(12), {hash_of(A)})
        publisher.publish(LogBatch("e", Seq(12), Seq(100), [change(100)], jumps=[(Seq(12), Seq(100))]))
        assert [100] == held(12, 100, A)
        with pytest.raises(LogTruncated):
            held(12, 13, A)  # a number that a new term has undone
        publisher.publish(batch(change(101, record="x" * MAX_HELD)))
        with pytest.raises(LogTruncated):
            held(7, 8, A)


# Subscriptions


class Wanted:
    """Hashes that are wanted, and what arrives for them."""

    def __init__(self, link: Link) -> None:
        self.hashes = set[int]()
        self.got = set[bytes]()
        self.subscriptions = ContentSubscriptions(link, self.hashes.__contains__, self.got.add)

    async def until(self, *messages: bytes) -> None:
        while not self.got.issuperset(messages):
            await asyncio.sleep(0.001)


async def test_ten_thousand_topics_at_once_leave_others_their_turns(prefix: str) -> None:
    async with running_nats() as nats, AsyncExitStack() as stack:
        link, sender = [await stack.enter_async_context(running_link(nats.url, prefix, name)) for name in "ab"]
        async with asyncio.TaskGroup() as group:
            await asyncio.gather(link.connected.wait(), sender.connected.wait())
            wanted = Wanted(link)
            running = group.create_task(wanted.subscriptions.run())
            wanted.hashes.update(number << 40 for number in range(10_000))

            async def turns_until(count: int) -> int:
                turns = 0
                while len(wanted.subscriptions) != count:
                    turns += 1
                    await asyncio.sleep(0)
                return turns

            wanted.subscriptions.update(wanted.hashes)
            assert await turns_until(10_000) >= 10_000 // SLICE
            await until_received(sender, wanted, b"last", 9_999 << 40)
            await nats.kill()
            await until_cut_off(link)
            await nats.start()
            await sender.connected.wait()
            await until_received(sender, wanted, b"again", 9_999 << 40, 0)
            gone = {number << 40 for number in range(1, 10_000)}
            wanted.hashes -= gone
            wanted.subscriptions.update(gone)
            assert await turns_until(1) >= 9_999 // SLICE
            wanted.got.clear()
            sender.publish(f"t.{5 << 40:016x}", b"nobody's")
            await until_received(sender, wanted, b"kept", 0)
            assert {b"kept"} == wanted.got
            running.cancel()


async def until_received(sender: Link, wanted: Wanted, message: bytes, *hashes: int) -> None:
    """Send a message for each hash until all have arrived."""
    expected = {b"%s %d" % (message, topic_hash) for topic_hash in hashes} if len(hashes) > 1 else {message}
    while not wanted.got >= expected:
        for topic_hash in hashes:
            sender.publish(
                f"t.{topic_hash:016x}", b"%s %d" % (message, topic_hash) if len(hashes) > 1 else message
            )  # fmt: skip
        await asyncio.sleep(0.001)


async def test_a_receiver_of_contents_that_raises_does_not_end_the_reading(nats: NatsServer, prefix: str) -> None:
    async with running_link(nats.url, prefix) as link, asyncio.TaskGroup() as group:
        await link.connected.wait()
        wanted = Wanted(link)
        wanted.hashes.add(7)
        running = group.create_task(wanted.subscriptions.run())
        wanted.subscriptions.update([7])
        receive, failures = wanted.subscriptions.receive, list[bytes]()

        def fail(data: bytes) -> None:
            wanted.subscriptions.receive = receive
            failures.append(data)
            raise RuntimeError("a bug")

        wanted.subscriptions.receive = fail
        await until_received(link, wanted, b"x", 7)
        assert ([b"x"], True) == (failures, link.connected.is_set())
        running.cancel()


async def test_refused_subjects_of_contents_are_named_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RETRY_REFUSED", 0.05)
    users = """
    authorization { users = [
      { user: member, password: hunter2 }
      { user: gateway, password: hunter2, permissions: { publish: ["P.q.*"], subscribe: ["P.log", "P.a.>"] } }
    ] }
    """
    async with running_nats(users) as nats, AsyncExitStack() as stack:
        link, sender = [
            await stack.enter_async_context(running_link(f"nats://{user}:hunter2@{nats.address}", "P", user))
            for user in ("gateway", "member")
        ]
        async with asyncio.TaskGroup() as group:
            await asyncio.gather(link.connected.wait(), sender.connected.wait())
            wanted = Wanted(link)
            running = group.create_task(wanted.subscriptions.run())
            wanted.hashes.update(range(100))
            wanted.subscriptions.update(wanted.hashes)
            while not link.failure:
                await asyncio.sleep(0.001)
            assert 'NATS does not permit this node to subscribe to "p.t.>"' == link.failure
            nats.configure(users.replace('"P.log"', '"P.log", "P.t.>"'))
            nats.signal(signal.SIGHUP)
            await until_received(sender, wanted, b"x", 99)
            running.cancel()
