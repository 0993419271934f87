"""Questions over a real NATS server, and how a node chooses whom to ask."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from daemon.core.batch import FRESH
from daemon.relay import questions
from daemon.relay.errors import AnswerError, RelayUnavailable
from daemon.relay.link import Link
from daemon.relay.questions import (
    ASK_TIMEOUT,
    MAX_ANSWER,
    MAX_ANSWERS,
    MAX_OF_A_KIND,
    MAX_PART,
    MAX_QUEUED,
    SILENCE,
    Answer,
    Answerer,
    Asker,
    MemberClient,
)
from tests.support.nats import NatsServer, running_link, running_nats

TIMEOUT = 30.0  # seconds, more than any answer takes


@asynccontextmanager
async def asking(server: NatsServer, prefix: str, answer: Answer) -> AsyncIterator[Link]:
    """A link; another one, of the node `member`, answers."""
    async with (
        running_link(server.url, prefix, "member") as member,
        running_link(server.url, prefix, "gateway") as link,
    ):
        member.answer("member", answer)
        await member.connected.wait()
        await link.connected.wait()
        yield link


async def echo(question: str, payload: bytes) -> bytes:
    return question.encode() + b" " + payload


async def test_an_answer_comes_back_to_its_question(nats: NatsServer, prefix: str) -> None:
    async with asking(nats, prefix, echo) as link:
        asked = [link.ask("member", "rights", b"%d" % number, TIMEOUT) for number in range(200)]
        assert [b"rights %d" % number for number in range(200)] == await asyncio.gather(*asked)


@pytest.mark.parametrize("size", [0, 1, MAX_PART, MAX_PART + 1, 5_000_000])
async def test_an_answer_of_any_size_arrives_whole(nats: NatsServer, prefix: str, size: int) -> None:
    whole = (b"0123456789abcde" * (size // 15 + 1))[:size]

    async def answer(question: str, payload: bytes) -> bytes:
        return whole

    async with asking(nats, prefix, answer) as link:
        assert whole == await link.ask("member", "batches", b"", TIMEOUT)


async def test_what_is_too_large_is_refused_on_either_side(nats: NatsServer, prefix: str) -> None:
    async def answer(question: str, payload: bytes) -> bytes:
        return bytes(MAX_ANSWER + 1)

    async with asking(nats, prefix, answer) as link:
        for payload in (b"", bytes(MAX_PART + 1)):
            with pytest.raises(AnswerError) as refused:
                await link.ask("member", "batches", payload, TIMEOUT)
            assert "too_large" == refused.value.code


async def test_a_refusal_reaches_its_asker_and_a_bug_does_not_in_detail(nats: NatsServer, prefix: str) -> None:
    async def answer(question: str, payload: bytes) -> bytes:
        if question == "truncated":
            raise AnswerError("truncated", "the log begins later")
        raise RuntimeError("canary")

    async with asking(nats, prefix, answer) as link:
        with pytest.raises(AnswerError) as refused:
            await link.ask("member", "truncated", b"", TIMEOUT)
        assert ("truncated", "the log begins later") == (refused.value.code, refused.value.text)
        with capture_logs() as logs, pytest.raises(AnswerError) as failed:
            await link.ask("member", "other", b"", TIMEOUT)
        assert ("internal", False) == (failed.value.code, "canary" in failed.value.text)
        assert [("internal_error", "other")] == [(line["event"], line["question"]) for line in logs]


async def test_a_node_that_does_not_exist_is_known_at_once(nats: NatsServer, prefix: str) -> None:
    async with asking(nats, prefix, echo) as link:
        with pytest.raises(RelayUnavailable, match="no node of that name listens"):
            await link.ask("stranger", "rights", b"", TIMEOUT)


async def test_a_slow_answer_is_waited_for_and_a_silent_node_is_not(nats: NatsServer, prefix: str) -> None:
    release = asyncio.Event()

    async def answer(question: str, payload: bytes) -> bytes:
        await release.wait()
        return b"late"

    loop = asyncio.get_running_loop()
    async with asking(nats, prefix, answer) as link, asking(nats, f"{prefix}.deaf", echo) as other:
        slow = asyncio.create_task(link.ask("member", "rows", b"", TIMEOUT))
        other.subscribe("q.silent", lambda message: None)
        began = loop.time()
        with pytest.raises(RelayUnavailable, match="silent has not answered in time"):
            await other.ask("silent", "rights", b"", TIMEOUT)
        assert SILENCE <= loop.time() - began + 0.1
        with pytest.raises(RelayUnavailable, match="member has not answered in time"):
            await link.ask("member", "rows", b"", SILENCE * 1.5)
        release.set()
        assert b"late" == await slow


async def test_a_lost_connection_ends_all_questions_at_once(prefix: str) -> None:
    async with running_nats() as server:
        begun = asyncio.Event()

        async def answer(question: str, payload: bytes) -> bytes:
            begun.set()
            await asyncio.Event().wait()  # for ever
            raise AssertionError

        async with asking(server, prefix, answer) as link:
            asked = asyncio.create_task(link.ask("member", "rows", b"", TIMEOUT))
            await begun.wait()
            await server.kill()
            with pytest.raises(RelayUnavailable, match="closed the connection"):
                await asked
            with pytest.raises(RelayUnavailable, match=server.address):
                await link.ask("member", "rows", b"", TIMEOUT)


async def test_more_questions_than_a_node_can_answer_are_refused(nats: NatsServer, prefix: str) -> None:
    release, running, most = asyncio.Event(), 0, 0

    async def answer(question: str, payload: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1
        return payload

    async with asking(nats, prefix, answer) as link:
        number = MAX_ANSWERS + MAX_QUEUED + 10
        asked = [asyncio.create_task(link.ask("member", f"q{i % 8}", b"%d" % i, TIMEOUT)) for i in range(number)]
        pending = set(asked)
        while number - len(pending) < 10:  # before room is made, all of them must have come
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        release.set()
        done = await asyncio.gather(*asked, return_exceptions=True)
        refused = [error.code for error in done if isinstance(error, AnswerError)]
        assert (["overloaded"] * 10, MAX_ANSWERS) == (refused, most)


async def test_slow_questions_leave_room_for_others(nats: NatsServer, prefix: str) -> None:
    release, running = asyncio.Event(), 0

    async def answer(question: str, payload: bytes) -> bytes:
        nonlocal running
        if question == "rows":
            running += 1
            await release.wait()
        return b"%d" % running

    async with asking(nats, prefix, answer) as link:
        slow = [asyncio.create_task(link.ask("member", "rows", b"", TIMEOUT)) for _ in range(3 * MAX_OF_A_KIND)]
        while running < MAX_OF_A_KIND:
            await asyncio.sleep(0)
        assert b"%d" % MAX_OF_A_KIND == await link.ask("member", "rights", b"", TIMEOUT)
        release.set()
        await asyncio.gather(*slow)
        assert 3 * MAX_OF_A_KIND == running


class Wire:
    """Carries messages between an asker and an answerer, and may lose some."""

    waiting = 0

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, str]] = []

    def send(self, subject: str, payload: bytes, reply: str = "") -> bool:
        self.sent.append((subject, payload, reply))
        return True


async def test_a_lost_part_is_noticed_with_the_next_one() -> None:
    wire = Wire()
    asker = Asker(wire, "inbox")
    asked = asyncio.create_task(asker.ask("member", "q.member", "batches", b"", TIMEOUT))
    await asyncio.sleep(0)
    [(_, question, reply)] = wire.sent

    async def answer(question: str, payload: bytes) -> bytes:
        return bytes(3 * MAX_PART)

    Answerer(wire, answer).receive(question, reply)
    while len(wire.sent) < 4:
        await asyncio.sleep(0)
    for subject, part, _ in wire.sent[2:]:
        asker.receive(subject, part, unanswerable=False)
    with pytest.raises(RelayUnavailable, match="a part of the answer of member was lost"):
        await asked


async def test_another_version_is_named_on_either_side() -> None:
    wire = Wire()
    asker = Asker(wire, "inbox")
    asked = asyncio.create_task(asker.ask("member", "q.member", "rights", b"", TIMEOUT))
    await asyncio.sleep(0)
    [(_, question, reply)] = wire.sent
    answerer = Answerer(wire, echo)
    answerer.receive(b"\x07" + question[1:], reply)
    _, refusal, _ = wire.sent[-1]
    assert b"another version (7)" in refusal
    asker.receive(reply, b"\x07" + refusal[1:], unanswerable=False)
    with pytest.raises(RelayUnavailable, match=r"another version \(7\)"):
        await asked


async def test_a_question_that_nobody_waits_for_any_more_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MAX_ANSWERS", 1)
    wire, asked, release = Wire(), [], asyncio.Event()

    async def answer(question: str, payload: bytes) -> bytes:
        asked.append(payload)
        await release.wait()
        return payload

    asker, answerer = Asker(wire, "inbox"), Answerer(wire, answer)
    waiting = [
        asyncio.create_task(asker.ask("m", "q.m", "rows", payload, timeout))
        for payload, timeout in ((b"first", TIMEOUT), (b"expired", 0.0), (b"last", TIMEOUT))
    ]
    await asyncio.sleep(0)
    for _, question, reply in list(wire.sent):
        answerer.receive(question, reply)
    release.set()
    while len(wire.sent) < 5:
        await asyncio.sleep(0)
    assert [b"first", b"last"] == asked
    for subject, part, _ in wire.sent[3:]:
        asker.receive(subject, part, unanswerable=False)
    first, expired, last = await asyncio.gather(*waiting, return_exceptions=True)
    assert (b"first", RelayUnavailable, b"last") == (first, type(expired), last)


class Members:
    """Members that answer with their name, or do not answer."""

    def __init__(self, **failures: Exception) -> None:
        self.failures = failures
        self.asked: list[str] = []
        self.timeouts: list[float] = []
        self.now = 0.0
        self.client = MemberClient(self.ask, {"rows": 60.0}, clock=lambda: self.now)

    async def ask(self, node: str, question: str, payload: bytes, timeout: float) -> bytes:  # noqa: ASYNC109
        self.asked.append(node)
        self.timeouts.append(timeout)
        if node in self.failures:
            self.now += SILENCE
            raise self.failures[node]
        return node.encode()


async def test_only_members_whose_beat_is_fresh_are_asked() -> None:
    members = Members()
    with pytest.raises(RelayUnavailable, match="hears no member"):
        await members.client.ask("rights", b"")
    members.client.record_beat("old")
    members.now = FRESH - 0.5
    members.client.record_beat("new")
    members.now = FRESH
    assert ["new"] == members.client.fresh
    assert b"new" == await members.client.ask("rights", b"")
    members.now = 10.0
    with pytest.raises(RelayUnavailable, match="hears no member"):
        await members.client.ask("rights", b"")


async def test_another_member_is_asked_if_one_is_silent_or_overloaded() -> None:
    members = Members(a=RelayUnavailable("silent"), b=AnswerError("overloaded", ""))
    for name in "abc":
        members.client.record_beat(name)
    for _ in range(20):
        assert b"c" == await members.client.ask("rights", b"")
        members.now = 0.0
    assert 1 == members.asked.count("a"), "a silent member is left out until its next beat"
    assert 1 < members.asked.count("b")
    members.failures["c"] = RelayUnavailable("silent")
    with pytest.raises(RelayUnavailable):
        await members.client.ask("rights", b"")


async def test_a_question_has_a_time_in_total_that_depends_on_its_name() -> None:
    members = Members(**{name: RelayUnavailable("silent") for name in "abc"})
    for question, timeout in (("rights", ASK_TIMEOUT), ("rows", 60.0)):
        for name in "abc":
            members.client.record_beat(name)
        members.timeouts.clear()
        with pytest.raises(RelayUnavailable, match="silent"):
            await members.client.ask(question, b"")
        assert [timeout, timeout - SILENCE, timeout - 2 * SILENCE] == members.timeouts


async def test_a_refusal_of_a_member_is_the_answer() -> None:
    members = Members(a=AnswerError("truncated", ""), b=AnswerError("truncated", ""))
    members.client.record_beat("a")
    members.client.record_beat("b")
    with pytest.raises(AnswerError):
        await members.client.ask("batches", b"")
    assert 1 == len(members.asked)


async def test_a_stopped_server_silences_a_node_only_as_long(nats: NatsServer, prefix: str) -> None:
    async with asking(nats, prefix, echo) as link:
        nats.signal(signal.SIGSTOP)
        try:
            with pytest.raises(RelayUnavailable, match="has not answered in time"):
                await link.ask("member", "rights", b"", TIMEOUT)
        finally:
            nats.signal(signal.SIGCONT)
        assert b"rights x" == await link.ask("member", "rights", b"x", TIMEOUT)
        assert link.connected.is_set()
