"""Rights that end in the middle of a stream: nothing written afterwards is told."""

import asyncio
import random
import time

import pytest

from tests.faults.checker import CLEAN, Checker
from tests.faults.harness import MUTANT_NET, NET, NOWHERE, SEED, Stage, late, middle, stage, times
from tests.faults.oracle import Style, Write
from tests.faults.results import Results

SLOW_REPLAY = {"ROWCAST_READ_CHUNK": "2", "ROWCAST_RECENT_BYTES": "0"}  # each replay is many reads
END = "delete from chatgenius.channel_members where (channel_id, user_id) = ($1, $2)"


class Ended:
    """Who has lost a channel, and from which tag of the writers on."""

    def __init__(self, play: Stage) -> None:
        self._play = play
        self._ended: dict[tuple[str, str], int] = {}

    async def end(self, checker: Checker, channel: str, *, ring: bool = True) -> None:
        """Take a member out. What is begun after its commit has a later tag than what was begun before it."""
        who = (checker.user, f"channel:{channel}")
        connection = await self._play.oracle.connect()
        async with connection.transaction():
            if not ring:
                await connection.execute("set local rowcast.ring = off")
            await connection.execute(END, channel, checker.user)
        await connection.close()
        self._ended[who] = int(self._play.oracle.tag) + 1
        self._play.oracle.tag = str(self._ended[who])

    def forbidden(self, checker: Checker, write: Write) -> bool:
        """Begun after the right had ended."""
        ended = self._ended.get((checker.user, write.topic))
        return ended is not None and _number(write) >= ended

    def owed(self, checker: Checker, write: Write) -> bool:
        """Not to somebody who lost the topic: what was on its way then may come, or not."""
        return (checker.user, write.topic) not in self._ended


def _number(write: Write) -> int:
    return int(write.tag) if write.tag.isdigit() else 10**9  # a mark comes last


async def until_revoked(checker: Checker, topic: str) -> None:
    while topic not in checker.revoked and topic not in checker.refused:
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("daemons", [1, 2])
@pytest.mark.parametrize("ring", [True, False], ids=["rung", "nobody rings"])
async def test_nothing_written_after_a_right_ended_is_delivered(
    durable: str, results: Results, daemons: int, ring: bool
) -> None:
    chance = random.Random(SEED)
    users = times(6, 60)
    async with stage(durable, users=users, daemons=daemons) as play:
        play.oracle.tag = "0"
        ended = Ended(play)
        await play.follow(users, url=play.daemons[-1].url)
        play.write(4, Style(pause=0.005, settings={} if ring else {"rowcast.ring": "off"}))
        waits: list[float] = []
        for checker in play.checkers[1:]:
            await play.heard(chance.randint(1, 40))
            channel = chance.choice(play.oracle.channels)
            began = time.monotonic()
            await ended.end(checker, channel, ring=ring)
            await until_revoked(checker, f"channel:{channel}")
            waits.append(time.monotonic() - began)
        verdict = await play.verdict(forbidden=ended.forbidden, owed=ended.owed)
    assert CLEAN == verdict
    results.held(
        f"29 ({daemons} daemon{'s' * (daemons - 1)}{'' if ring else ', no ring'})",
        "a membership ends during a live stream" + ("" if ring else ", without NOTIFY"),
        f"{len(waits)} members lose a channel after a random number of frames"
        + (", connected to the daemon that does not lead" if daemons > 1 else ""),
        "0 leaked",
        f"commit to `revoked`: p50 {middle(waits) * 1e3:.0f} ms, p99 {late(waits) * 1e3:.0f} ms",
        play.n,
    )


async def test_rights_checked_only_at_subscribe_leak_later_writes(durable: str, results: Results) -> None:
    async with stage(durable, users=2, mutants=["rights_at_subscribe"]) as play:
        play.oracle.tag = "0"
        ended = Ended(play)
        await play.follow(2)
        play.write(2)
        await play.heard(20)
        await ended.end(play.checkers[1], play.oracle.channels[0])
        await play.heard(50)
        verdict = await play.verdict(forbidden=ended.forbidden, owed=ended.owed, within=MUTANT_NET)
    assert 0 < verdict.leaked
    for kind in ("1 daemon", "2 daemons", "1 daemon, no ring", "2 daemons, no ring"):
        results.caught(f"29 ({kind})", "rights_at_subscribe", verdict)


@pytest.mark.parametrize("mutants", [[], ["rights_of_the_live"]])
async def test_a_right_that_ends_during_a_replay_ends_for_the_replay_too(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, users=2, environment=SLOW_REPLAY, mutants=mutants) as play:
        play.oracle.tag = "0"
        ended = Ended(play)
        await play.follow(2)
        leaver = play.checkers[1]
        for _ in range(rounds := 1 if mutants else times(2, 3)):
            [channel] = [channel for channel in play.oracle.channels if f"channel:{channel}" not in leaver.revoked][
                :1
            ]
            play.write(4, Style(pause=0.002))
            await play.heard(50)
            where = leaver.url
            leaver.url = lambda: NOWHERE
            assert leaver.line is not None
            leaver.line.transport.abort()
            await play.heard(500)
            await play.quiet()
            play.stop.clear()
            play.write(1, Style(pause=0.05))  # a replay must be able to overtake it
            leaver.url = where
            await play.heard(20, leaver)
            assert not leaver.live.is_set()  # it is being replayed
            await ended.end(leaver, channel)
            await leaver.live.wait()
            await play.heard(20)
            await play.quiet()
            play.stop.clear()
        verdict = await play.verdict(
            forbidden=ended.forbidden, owed=ended.owed, within=MUTANT_NET if mutants else NET
        )
    if mutants:
        assert 0 < verdict.leaked
        results.caught("29 (replay)", mutants[0], verdict)
        return
    assert CLEAN == verdict
    results.held(
        "29 (replay)",
        "a membership ends during the member's replay",
        f"500 changes behind, read two at a time; {rounds} times",
        "0 leaked",
        "",
        play.n,
    )


@pytest.mark.parametrize("mutants", [[], ["rights_from_the_first"]])
async def test_a_member_added_while_offline_receives_nothing_from_before(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, users=times(3, 30), mutants=mutants) as play:
        [channel, *_] = play.oracle.channels
        newcomers = play.oracle.users[1:]
        await play.oracle.execute(
            "delete from chatgenius.channel_members where channel_id = $1 and user_id = any ($2)", channel, newcomers
        )
        await play.follow(len(play.oracle.users))
        _, *away = play.checkers
        play.write(3)
        before: dict[str, set[str]] = {}
        for checker in away:
            await play.heard(20)
            where, checker.url = checker.url, lambda: NOWHERE
            assert checker.line is not None
            checker.line.transport.abort()
            await play.heard(20)
            before[checker.user] = set(play.oracle.acknowledged)
            await play.oracle.execute(
                "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", channel, checker.user
            )
            await play.heard(20)
            checker.ask_again()
            checker.url = where
        await play.back()
        topic = f"channel:{channel}"
        verdict = await play.verdict(
            resets={"rights"},
            forbidden=lambda checker, write: write.topic == topic and write.token in before.get(checker.user, ()),
            within=MUTANT_NET if mutants else NET,
        )
    if mutants:
        assert 0 < verdict.leaked
        results.caught("29 (begin)", mutants[0], verdict)
        return
    assert CLEAN == verdict
    results.held(
        "29 (begin)",
        "a membership begins while the member is offline",
        f"{len(away)} clients resume from before they were members",
        "0 leaked; each got `reset` with `rights`, and everything from there on",
        "",
        play.n,
    )
