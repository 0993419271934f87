"""Rights that end in the middle of a stream: nothing written afterwards is delivered."""

import random
import time

import pytest

from tests.faults.checker import CLEAN
from tests.faults.ended_rights import EndedRights, until_revoked
from tests.faults.harness import (
    MUTANT_TIMEOUT,
    NOWHERE,
    SEED,
    TIMEOUT,
    by_form,
    median,
    percentile,
    scenario,
)
from tests.faults.oracle import Style
from tests.faults.results import Results

SLOW_REPLAY = {"ROWCAST_READ_CHUNK": "2", "ROWCAST_RECENT_BYTES": "0"}  # each replay is many reads


@pytest.mark.parametrize("daemons", [1, 2])
@pytest.mark.parametrize("notify", [True, False], ids=["with NOTIFY", "without NOTIFY"])
async def test_nothing_written_after_a_right_ended_is_delivered(
    durable: str, results: Results, daemons: int, notify: bool
) -> None:
    chance = random.Random(SEED)
    users = by_form(6, 60)
    async with scenario(durable, users=users, daemons=daemons) as run:
        run.oracle.tag = "0"
        ended = EndedRights(run)
        await run.follow(users, url=run.daemons[-1].url)
        run.write(4, Style(pause=0.005, settings={} if notify else {"rowcast.ring": "off"}))
        waits: list[float] = []
        for checker in run.checkers[1:]:
            await run.received(chance.randint(1, 40))
            channel = chance.choice(run.oracle.channels)
            began = time.monotonic()
            await ended.end(checker, channel, notify=notify)
            await until_revoked(checker, f"channel:{channel}")
            waits.append(time.monotonic() - began)
        verdict = await run.verdict(forbidden=ended.forbidden, owed=ended.owed)
    assert CLEAN == verdict
    results.held(
        f"29 ({daemons} daemon{'s' * (daemons - 1)}{'' if notify else ', no NOTIFY'})",
        "a membership ends during a live stream" + ("" if notify else ", without NOTIFY"),
        f"{len(waits)} members lose a channel after a random number of frames"
        + (", connected to the daemon that does not lead" if daemons > 1 else ""),
        "0 leaked",
        f"commit to `revoked`: p50 {median(waits) * 1e3:.0f} ms, p99 {percentile(waits) * 1e3:.0f} ms",
        run.n,
    )


async def test_rights_checked_only_at_subscribe_leak_later_writes(durable: str, results: Results) -> None:
    async with scenario(durable, users=2, mutants=["rights_at_subscribe"]) as run:
        run.oracle.tag = "0"
        ended = EndedRights(run)
        await run.follow(2)
        run.write(2)
        await run.received(20)
        await ended.end(run.checkers[1], run.oracle.channels[0])
        await run.received(50)
        verdict = await run.verdict(forbidden=ended.forbidden, owed=ended.owed, within=MUTANT_TIMEOUT)
    assert 0 < verdict.leaked
    for kind in ("1 daemon", "2 daemons", "1 daemon, no NOTIFY", "2 daemons, no NOTIFY"):
        results.caught(f"29 ({kind})", "rights_at_subscribe", verdict)


@pytest.mark.parametrize("mutants", [[], ["no_revocation_during_replay"]])
async def test_a_right_that_ends_during_a_replay_ends_for_the_replay_too(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, users=2, environment=SLOW_REPLAY, mutants=mutants) as run:
        run.oracle.tag = "0"
        ended = EndedRights(run)
        await run.follow(2)
        leaver = run.checkers[1]
        for _ in range(rounds := 1 if mutants else by_form(2, 3)):
            [channel] = [channel for channel in run.oracle.channels if f"channel:{channel}" not in leaver.revoked][:1]
            run.write(4, Style(pause=0.002))
            await run.received(50)
            where = leaver.url
            leaver.url = lambda: NOWHERE
            assert leaver.connection is not None
            leaver.connection.transport.abort()
            await run.received(500)
            await run.stop_writers()
            run.stop.clear()
            run.write(1, Style(pause=0.05))  # a replay must be able to overtake it
            leaver.url = where
            await run.received(20, leaver)
            assert not leaver.live.is_set()  # it is still being replayed
            await ended.end(leaver, channel)
            await leaver.live.wait()
            await run.received(20)
            await run.stop_writers()
            run.stop.clear()
        verdict = await run.verdict(
            forbidden=ended.forbidden, owed=ended.owed, within=MUTANT_TIMEOUT if mutants else TIMEOUT
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
        run.n,
    )


@pytest.mark.parametrize("mutants", [[], ["rights_without_a_start"]])
async def test_a_member_added_while_offline_receives_nothing_from_before(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, users=by_form(3, 30), mutants=mutants) as run:
        [channel, *_] = run.oracle.channels
        newcomers = run.oracle.users[1:]
        await run.oracle.execute(
            "delete from chatgenius.channel_members where channel_id = $1 and user_id = any ($2)", channel, newcomers
        )
        await run.follow(len(run.oracle.users))
        _, *away = run.checkers
        run.write(3)
        before: dict[str, set[str]] = {}
        for checker in away:
            await run.received(20)
            where, checker.url = checker.url, lambda: NOWHERE
            assert checker.connection is not None
            checker.connection.transport.abort()
            await run.received(20)
            before[checker.user] = set(run.oracle.acknowledged)
            await run.oracle.execute(
                "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", channel, checker.user
            )
            await run.received(20)
            checker.retry_lost_topics()
            checker.url = where
        await run.reconnected()
        topic = f"channel:{channel}"
        verdict = await run.verdict(
            resets={"rights"},
            forbidden=lambda checker, write: write.topic == topic and write.token in before.get(checker.user, ()),
            within=MUTANT_TIMEOUT if mutants else TIMEOUT,
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
        run.n,
    )
