"""Many writers, and many clients at gateways, which have no database, while something between them fails."""

import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from tests.faults.checker import CLEAN, Reset
from tests.faults.deleted_rows import Secrets, leaks_of_a_replay
from tests.faults.ended_rights import EndedRights, until_revoked
from tests.faults.failover import HOW, failover
from tests.faults.harness import (
    MUTANT_TIMEOUT,
    SEED,
    TIMEOUT,
    Scenario,
    Server,
    Supervised,
    by_form,
    leader_of,
    median,
    own_server,
    scenario,
)
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results
from tests.support.gateways import NOWHERE
from tests.support.nats import NatsServer, running_nats

MEMORY = {"ROWCAST_RECENT_BYTES": "32000000"}


@dataclass(eq=False)
class Nodes:
    """Members and gateways around one NATS server, and what runs on them."""

    run: Scenario
    nats: NatsServer
    gateways: list[Supervised]

    def url(self) -> str:
        """A gateway that runs, if one does, for a client that comes back."""
        return random.choice([gateway for gateway in self.gateways if gateway.daemon] or self.gateways).url()


@asynccontextmanager
async def nodes(
    server: Server | str,
    *,
    members: int = 2,
    mutants: Sequence[str] = (),
    mutants_of_members: Sequence[str] = (),
    users: int = 4,
    through: Proxy | None = None,
) -> AsyncIterator[Nodes]:
    """Two gateways, from which safeguards are removed. Clients connect to gateways, writers to Postgres."""
    async with running_nats() as nats, AsyncExitStack() as stack:
        environment = {**MEMORY, "ROWCAST_NATS_URL": nats.url}
        run = await stack.enter_async_context(
            scenario(
                server,
                mutants=mutants_of_members,
                environment=environment,
                daemons=members,
                users=users,
                through=through,
            )
        )
        gateways = [Supervised(NOWHERE, mutants, environment, ("gateway",)) for _ in range(2)]
        for gateway in gateways:
            await gateway.start()
            stack.push_async_callback(gateway.stop, signal.SIGTERM)
        yield Nodes(run, nats, gateways)


@asynccontextmanager
async def gateway_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of a gateway; its clients come back at the other one."""
    await them.gateways[0].stop(signal.SIGKILL)
    yield
    await them.gateways[0].start()


@asynccontextmanager
async def leader_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of the member that leads; the other one takes over."""
    leading = leader_of(them.run)
    await them.run.daemons[leading].stop(signal.SIGKILL)
    yield
    await them.run.daemons[leading].start()


@asynccontextmanager
async def gateway_stopped(them: Nodes) -> AsyncIterator[None]:
    """SIGSTOP of a gateway behind thousands of writes, SIGCONT."""
    [gateway, _] = them.gateways
    assert gateway.daemon
    gateway.daemon.process.send_signal(signal.SIGSTOP)
    await them.run.committed(by_form(200, 2000))
    gateway.daemon.process.send_signal(signal.SIGCONT)
    yield


@asynccontextmanager
async def nats_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of the NATS server, which starts again."""
    await them.nats.kill()
    await them.run.committed(20)
    await them.nats.start()
    yield


@asynccontextmanager
async def nats_stopped(them: Nodes) -> AsyncIterator[None]:
    """SIGSTOP of the NATS server, SIGCONT: what waits for it too long is lost, and nobody is disconnected."""
    them.nats.signal(signal.SIGSTOP)
    await them.run.committed(by_form(100, 1000))
    them.nats.signal(signal.SIGCONT)
    yield


Fault = Callable[[Nodes], AbstractAsyncContextManager[None]]
"""It happens when this is entered; what has gone is back when it is left."""

FAULTS: dict[str, tuple[Fault, str]] = {
    "2 (gateway)": (gateway_killed, "kill -9 of a gateway"),
    "2 (leader, gateways)": (leader_killed, "kill -9 of the member that leads"),
    "10 (gateway)": (gateway_stopped, "a gateway is stopped behind many writes"),
    "31 (NATS killed)": (nats_killed, "kill -9 of the NATS server"),
    "31 (NATS stopped)": (nats_stopped, "the NATS server is stopped"),
}


MUTANTS = {
    "2 (gateway)": (["resume_from_head"], []),
    "2 (leader, gateways)": ([], ["no_stored_snapshot"]),
}
"""What is removed from gateways, and from members, so that a fault is not survived."""


@pytest.mark.parametrize("number", FAULTS)
async def test_clients_of_gateways_miss_nothing(durable: str, results: Results, number: str) -> None:
    chance = random.Random(SEED)
    fault, name = FAULTS[number]
    recoveries: list[float] = []
    async with nodes(durable) as them:
        run = them.run
        await run.follow(by_form(6, 50), url=them.url)
        run.write(4)
        for _ in range(times := by_form(1, 10)):
            await run.received(chance.randint(10, 60))
            async with fault(them):
                recoveries.append(await run.recovered())
            await run.reconnected()
        verdict = await run.verdict()
    assert CLEAN == verdict
    results.held(
        number,
        f"{name}; its clients are at two gateways",
        f"{(fault.__doc__ or '').rstrip('.')}; {times} times, {len(run.checkers)} clients",
        "nothing lost or repeated, no reset",
        f"then all were served: p50 {median(recoveries):.2f} s, max {max(recoveries):.2f} s",
        run.n,
    )


@pytest.mark.parametrize("number", MUTANTS)
async def test_without_a_safeguard_clients_of_gateways_miss_changes(
    durable: str, results: Results, number: str
) -> None:
    of_gateways, of_members = MUTANTS[number]
    async with nodes(durable, mutants=of_gateways, mutants_of_members=of_members) as them:
        run = them.run
        await run.follow(6, url=them.url)
        run.write(4)
        await run.received(50)
        async with FAULTS[number][0](them):
            await run.committed(50)
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.lost
    [mutant] = [*of_gateways, *of_members]
    results.caught(number, mutant, verdict)


async def test_clients_of_gateways_miss_nothing_when_messages_are_lost(durable: str, results: Results) -> None:
    async with nodes(durable, members=1, mutants=["lossy_relay"]) as them:
        run = them.run
        await run.follow(by_form(4, 50), url=them.url)
        run.write(4)
        await run.committed(by_form(200, 5000))
        verdict = await run.verdict()
    assert CLEAN == verdict
    results.held(
        "31 (lossy)",
        "messages about batches are lost on their way to gateways",
        f"one in ten is lost, one in fifty arrives twice; {len(run.checkers)} clients",
        "what is missing is asked for; nothing lost or repeated, no reset",
        "",
        run.n,
    )


async def test_clients_of_gateways_miss_nothing_while_the_clocks_of_all_nodes_jump(
    durable: str, results: Results
) -> None:
    async with nodes(durable, mutants=["wild_clock"], mutants_of_members=["wild_clock"]) as them:
        await them.run.follow(by_form(4, 50), url=them.url)
        them.run.write(4)
        await them.run.committed(by_form(200, 5000))
        verdict = await them.run.verdict()
    assert CLEAN == verdict
    results.held(
        "21 (gateways)",
        "the clocks of members and gateways jump",
        "`time.time` is off by up to an hour, back or forth, at each call",
        "no order and no freshness depends on clocks; nothing lost or repeated, no reset",
        "",
        them.run.n,
    )


@pytest.mark.parametrize("mutant", ["no_prev", "no_fill"])
async def test_without_looking_at_what_a_batch_continues_gateways_lose_changes(
    durable: str, results: Results, mutant: str
) -> None:
    async with nodes(durable, members=1, mutants=["lossy_relay", mutant]) as them:
        await them.run.follow(2, url=them.url)
        them.run.write(4)
        await them.run.committed(200)
        verdict = await them.run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.lost
    results.caught("31 (lossy)", mutant, verdict)


@pytest.mark.parametrize("mutant", [None, "no_ends"])
async def test_nothing_written_after_a_right_ended_reaches_a_client_of_a_gateway(
    durable: str, results: Results, mutant: str | None
) -> None:
    chance = random.Random(SEED)
    users = 2 if mutant else by_form(4, 40)
    async with nodes(durable, members=1, users=users, mutants=[mutant] if mutant else []) as them:
        run = them.run
        run.oracle.tag = "0"
        ended = EndedRights(run)
        await run.follow(users, url=them.url)
        run.write(2 if mutant else 4, Style(pause=0.005))
        waits: list[float] = []
        for checker in run.checkers[1:]:
            await run.received(chance.randint(1, 40))
            began, channel = time.monotonic(), chance.choice(run.oracle.channels)
            await ended.end(checker, channel)
            if mutant:
                await run.received(50)
            else:
                await until_revoked(checker, f"channel:{channel}")
            waits.append(time.monotonic() - began)
        within = MUTANT_TIMEOUT if mutant else TIMEOUT
        verdict = await run.verdict(within=within, forbidden=ended.forbidden, owed=ended.owed)
    if mutant:
        assert 0 < verdict.leaked
        results.caught("29 (gateways)", mutant, verdict)
        return
    assert CLEAN == verdict
    results.held(
        "29 (gateways)",
        "a membership ends during a live stream from a gateway",
        f"{len(waits)} members lose a channel after a random number of frames",
        "0 leaked",
        f"commit to `revoked`: p50 {median(waits) * 1e3:.0f} ms, max {max(waits) * 1e3:.0f} ms",
        run.n,
    )


@pytest.mark.parametrize("mutant", [None, "no_gone"])
async def test_no_replay_at_a_gateway_contains_content_of_deleted_rows(
    durable: str, results: Results, mutant: str | None
) -> None:
    async with nodes(durable, members=1, mutants=[mutant] if mutant else []) as them:
        await them.run.follow(1, url=them.gateways[0].url)
        secrets = Secrets(them.run.oracle)
        count = 20 if mutant else by_form(50, 2000)
        leaked = await leaks_of_a_replay(them.run, secrets, count, them.gateways[0])
    if mutant:
        assert 0 < leaked
        results.caught("30 (gateway)", mutant, f"leaked {leaked}")
        return
    assert 0 == leaked
    results.held(
        "30 (gateway)",
        "rows are edited, moved, soft-deleted, restored, deleted; then a client replays them from a gateway's memory",
        "five or six changes of each row, at random",
        "0 frames with content of a deleted row",
        f"{len(secrets.gone)} of {count} rows deleted",
        f"{sum(map(len, secrets.contents.values())):,} versions",
    )


@pytest.mark.parametrize("mutant", [None, "no_reset"])
async def test_every_commit_reaches_clients_of_gateways_although_postgres_is_killed(
    results: Results, mutant: str | None
) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with own_server() as server, nodes(server, members=1, mutants=[mutant] if mutant else []) as them:
        run = them.run
        await run.follow(by_form(4, 20), url=them.url)
        run.write(3)
        for _ in range(kills := by_form(1, 10)):
            await run.received(chance.randint(10, 100))
            began = time.monotonic()
            await server.crash()
            await server.start()
            await (run.committed(50) if mutant else run.recovered())
            recoveries.append(time.monotonic() - began)
        verdict = await run.verdict(resets={"crash"}, within=MUTANT_TIMEOUT if mutant else TIMEOUT)
    if mutant:
        assert CLEAN != verdict
        results.caught("3 (gateways)", mutant, verdict)
        return
    assert CLEAN == verdict
    resets = sum(isinstance(event, Reset) for checker in run.checkers for event in checker.history)
    results.held(
        "3 (gateways)",
        "kill -9 of Postgres; its clients are at two gateways",
        f"{kills} times after a random number of frames; the numbering commits asynchronously",
        f"committed = delivered; {resets} resets, all `crash`; no number used twice",
        f"from the kill until all are served: p50 {median(recoveries):.2f} s, max {max(recoveries):.2f} s",
        run.n,
    )


@pytest.mark.parametrize("mutant", [None, "no_reset"])
async def test_failover_to_a_standby_resets_every_client_of_a_gateway(results: Results, mutant: str | None) -> None:
    async with (
        own_server() as server,
        Proxy(server.socket).serving() as proxy,
        nodes(server, members=2, through=proxy, mutants=[mutant] if mutant else []) as them,
        failover(server, proxy, them.run, them.url, by_form(4, 50)) as failed,
    ):
        failed.let_return()
        await (them.run.committed(100) if mutant else them.run.recovered())
        recovery = failed.seconds
        verdict = await them.run.verdict(resets={"epoch"}, within=MUTANT_TIMEOUT if mutant else TIMEOUT)
        lost, resets = await failed.lost(), failed.resets()
    assert 0 < lost
    if mutant:
        assert CLEAN != verdict
        results.caught("20 (gateways)", mutant, verdict)
        return
    assert CLEAN == verdict
    assert {1} == set(resets)
    results.held(
        "20 (gateways)",
        "failover to a standby that lags, behind two members; the clients are at two gateways",
        HOW,
        f"every client, connected or away, got one `reset` with `epoch` for each topic: {len(resets)}",
        f"{lost} acknowledged writes were lost with the primary; from the kill until all are served {recovery:.2f} s",
        them.run.n,
    )
