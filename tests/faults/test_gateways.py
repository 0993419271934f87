"""Many writers, and many clients at gateways, which have no database, while something between them fails."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest

from daemon.delivery.client import STALE_DELAY
from tests.faults.checker import CLEAN, Checker, Reset
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
from tests.support.nats import NatsServer, running_cluster, running_nats

MEMORY = {"ROWCAST_RECENT_BYTES": "32000000"}


@dataclass(eq=False)
class Nodes:
    """Members and gateways around NATS, and what runs on them.

    The member that leads has a line of its own to NATS, and so has the first gateway, if any node has.
    """

    run: Scenario
    servers: list[NatsServer]
    gateways: list[Supervised]
    leader_line: Proxy
    gateway_line: Proxy

    async def follow(self, count: int) -> None:
        """Start clients at both gateways, half of them at each. One whose gateway is gone comes to the other."""
        for first, second in (self.gateways, self.gateways[::-1]):
            await self.run.follow(count // 2, url=partial(_one_that_runs, first, second))

    def url(self) -> str:
        """A gateway that runs, if one does."""
        return random.choice([gateway for gateway in self.gateways if gateway.daemon] or self.gateways).url()

    def of(self, gateway: Supervised) -> list[Checker]:
        """The clients that are connected to a gateway."""
        assert gateway.daemon
        ports = {id(one): one.connection.remote_address[1] for one in self.run.checkers if one.connection}
        return [one for one in self.run.checkers if ports.get(id(one)) == gateway.daemon.address[1]]


def _one_that_runs(first: Supervised, second: Supervised) -> str:
    return (first if first.daemon else second).url()


@asynccontextmanager
async def nodes(
    server: Server | str,
    *,
    members: int = 2,
    mutants: Sequence[str] = (),
    mutants_of_members: Sequence[str] = (),
    users: int = 4,
    through: Proxy | None = None,
    is_cluster: bool = False,
    has_lines: bool = False,
) -> AsyncIterator[Nodes]:
    """Two gateways, from which safeguards are removed. Clients connect to gateways, writers to Postgres."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        servers = await enter(running_cluster()) if is_cluster else [await enter(running_nats("debug: true\n"))]
        url = ",".join(one.url for one in servers)
        lines = [await enter(Proxy(("127.0.0.1", servers[0].port)).serving()) for _ in range(2)]
        to_leader, to_gateway = ((f"nats://127.0.0.1:{line.port}" if has_lines else url) for line in lines)
        run = await enter(
            scenario(
                server,
                mutants=mutants_of_members,
                environment={**MEMORY, "ROWCAST_NATS_URL": to_leader},
                users=users,
                through=through,
            )
        )
        environment = {**MEMORY, "ROWCAST_NATS_URL": url}
        others = [Supervised(run.daemons[0].dsn, mutants_of_members, environment) for _ in range(members - 1)]
        run.daemons += others
        gateways = [
            Supervised(NOWHERE, mutants, {**MEMORY, "ROWCAST_NATS_URL": to}, ("gateway",)) for to in (to_gateway, url)
        ]
        for one in (*others, *gateways):
            await one.start()
            stack.push_async_callback(one.stop, signal.SIGTERM)
        yield Nodes(run, servers, gateways, *lines)


# What fails. Each happens when it is entered; what has gone is back when it is left.


@asynccontextmanager
async def gateway_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of a gateway; its clients come back at the other one."""
    gateway = max(them.gateways, key=lambda gateway: len(them.of(gateway)))
    await gateway.stop(signal.SIGKILL)
    yield
    await gateway.start()


@asynccontextmanager
async def leader_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of the member that leads; the other one takes over."""
    leading = leader_of(them.run)
    await them.run.daemons[leading].stop(signal.SIGKILL)
    yield
    await them.run.daemons[leading].start()


@asynccontextmanager
async def leader_cut_off(them: Nodes) -> AsyncIterator[None]:
    """Nothing passes between the leader and NATS until it has given up; what is written meanwhile reaches clients."""
    [leader, _] = them.run.daemons
    lost = leader.count("relay_lost")
    them.leader_line.hold()
    await them.run.committed(20)
    yield
    await leader.logged("relay_lost", lost + 1)
    them.leader_line.heal()


@asynccontextmanager
async def gateway_stopped(them: Nodes) -> AsyncIterator[None]:
    """SIGSTOP of a gateway behind many writes, SIGCONT once NATS has cut it off and more has been written."""
    [gateway, _], [nats] = them.gateways, them.servers
    assert gateway.daemon
    before = nats.log.count(CUT_OFF)
    gateway.daemon.process.send_signal(signal.SIGSTOP)
    await them.run.committed(by_form(200, 2000))
    while nats.log.count(CUT_OFF) == before:
        await asyncio.sleep(0.05)
    await them.run.committed(20)
    gateway.daemon.process.send_signal(signal.SIGCONT)
    yield


@asynccontextmanager
async def gateway_held(them: Nodes) -> AsyncIterator[None]:
    """Nothing passes between a gateway and NATS until its clients are told `stale`; others are served meanwhile."""
    [cut_off, served] = map(them.of, them.gateways)
    them.gateway_line.hold()
    await all_stale(cut_off)
    await them.run.recovered(served)
    them.gateway_line.heal()
    yield


@asynccontextmanager
async def gateway_forgotten(them: Nodes) -> AsyncIterator[None]:
    """A middlebox forgets the connection of a gateway to NATS; new ones pass."""
    them.gateway_line.forget()
    await them.run.committed(20)
    yield


@asynccontextmanager
async def nats_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of the NATS server, which starts again."""
    [nats] = them.servers
    await nats.kill()
    await them.run.committed(20)
    await nats.start()
    yield


@asynccontextmanager
async def nats_away(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of the NATS server, which starts again when all clients have been told `stale`."""
    [nats] = them.servers
    await nats.kill()
    await them.run.committed(20)
    await all_stale(them.run.checkers)
    await nats.start()
    yield


@asynccontextmanager
async def nats_stopped(them: Nodes) -> AsyncIterator[None]:
    """SIGSTOP of the NATS server, SIGCONT once all nodes have given it up and more has been written."""
    [nats] = them.servers
    everybody = [(one, one.count("relay_lost")) for one in (*them.run.daemons, *them.gateways)]
    nats.signal(signal.SIGSTOP)
    for one, lost in everybody:
        await one.logged("relay_lost", lost + 1)
    await them.run.committed(20)
    nats.signal(signal.SIGCONT)
    yield


@asynccontextmanager
async def server_killed(them: Nodes) -> AsyncIterator[None]:
    """SIGKILL of one of three NATS servers, to which a gateway is connected; it stays away until all are served."""
    [gateway, _] = them.gateways
    assert gateway.daemon
    used = [line["data"]["server"] for line in gateway.daemon.events() if line["event"] == "relay_connected"][-1]
    [server] = [server for server in them.servers if server.address == used]
    await server.kill()
    await them.run.committed(20)
    yield
    await server.start()


CUT_OFF = "Stale Client Connection - Closing"
"""What NATS says when a node has not answered its pings."""


async def all_stale(checkers: Sequence[Checker]) -> None:
    """Wait until these clients are told that changes may be missing."""
    while not all(checker.stale for checker in checkers):
        await asyncio.sleep(0.01)


class Fault(NamedTuple):
    """What fails, and what `nodes` has to make for it."""

    name: str
    happens: Callable[[Nodes], AbstractAsyncContextManager[None]]
    is_cluster: bool = False
    has_lines: bool = False

    def nodes(
        self, server: str, *, mutants: Sequence[str] = (), mutants_of_members: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[Nodes]:
        """What it needs. See the function of this name."""
        return nodes(
            server,
            mutants=mutants,
            mutants_of_members=mutants_of_members,
            is_cluster=self.is_cluster,
            has_lines=self.has_lines,
        )

    @property
    def injected(self) -> str:
        """How, for the table."""
        return (self.happens.__doc__ or "").rstrip(".")


FAULTS = {
    "2 (gateway)": Fault("kill -9 of a gateway", gateway_killed),
    "2 (leader, gateways)": Fault("kill -9 of the member that leads", leader_killed),
    "10 (gateway)": Fault("a gateway is stopped behind many writes", gateway_stopped),
    "31 (NATS killed)": Fault("kill -9 of the NATS server", nats_killed),
    "31 (NATS away)": Fault("the NATS server is away", nats_away),
    "31 (NATS stopped)": Fault("the NATS server is stopped", nats_stopped),
    "31 (NATS cluster)": Fault("kill -9 of one of three NATS servers", server_killed, is_cluster=True),
    "31 (NATS held)": Fault("a gateway is cut off from NATS", gateway_held, has_lines=True),
    "31 (NATS forgotten)": Fault(
        "a middlebox forgets the connection of a gateway", gateway_forgotten, has_lines=True
    ),
    "31 (leader cut)": Fault("the leader is cut off from NATS", leader_cut_off, has_lines=True),
}


@pytest.mark.parametrize("number", FAULTS)
async def test_clients_of_gateways_miss_nothing(durable: str, results: Results, number: str) -> None:
    chance = random.Random(SEED)
    fault = FAULTS[number]
    recoveries: list[float] = []
    async with fault.nodes(durable) as them:
        run = them.run
        await them.follow(by_form(6, 50))
        run.write(4)
        for _ in range(times := by_form(1, 10)):
            await run.received(chance.randint(10, 60))
            async with fault.happens(them):
                recoveries.append(await run.recovered())
            await run.reconnected()
        verdict = await run.verdict()
    assert CLEAN == verdict
    results.held(
        number,
        f"{fault.name}; its clients are at two gateways",
        f"{fault.injected}; {times} times, {len(run.checkers)} clients",
        "nothing lost or repeated, no reset",
        f"then all were served: p50 {median(recoveries):.2f} s, max {max(recoveries):.2f} s",
        run.n,
    )


MUTANTS = [
    ("2 (gateway)", ["resume_from_head"], []),
    ("2 (leader, gateways)", [], ["no_stored_snapshot"]),
    ("10 (gateway)", ["nothing_is_missing"], []),
    ("31 (NATS killed)", ["nothing_is_missing"], []),
    ("31 (NATS killed)", ["no_subscribe_again"], []),
    ("31 (NATS away)", ["nothing_is_missing"], []),
    ("31 (NATS stopped)", ["nothing_is_missing"], []),
    ("31 (NATS cluster)", ["one_server"], []),
    ("31 (NATS held)", ["nothing_is_missing"], []),
    ("31 (NATS forgotten)", ["no_silence_limit", "no_relay_pings"], []),
    ("31 (leader cut)", [], ["only_the_leader_beats"]),
]
"""What is removed from gateways, and from members, so that a fault is not survived."""


@pytest.mark.parametrize(("number", "of_gateways", "of_members"), MUTANTS)
async def test_without_a_safeguard_clients_of_gateways_miss_changes(
    durable: str, results: Results, number: str, of_gateways: list[str], of_members: list[str]
) -> None:
    fault = FAULTS[number]
    async with fault.nodes(durable, mutants=of_gateways, mutants_of_members=of_members) as them:
        run = them.run
        await them.follow(6)
        run.write(4)
        await run.received(50)
        async with fault.happens(them):
            await run.committed(50)
            verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.lost
    results.caught(number, ", ".join([*of_gateways, *of_members]), verdict)


@pytest.mark.parametrize("number", ["31 (NATS away)", "31 (NATS held)"])
async def test_without_a_limit_of_silence_clients_of_gateways_do_not_learn_that_nothing_arrives(
    durable: str, results: Results, number: str
) -> None:
    fault = FAULTS[number]
    async with fault.nodes(durable, mutants=["silence_is_proof"]) as them:
        await them.follow(2)
        them.run.write(1)
        await them.run.received(10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STALE_DELAY + MUTANT_TIMEOUT), fault.happens(them):
                pass
    results.caught(number, "silence_is_proof", "clients are not told `stale`")


async def test_clients_of_gateways_miss_nothing_when_messages_are_lost(durable: str, results: Results) -> None:
    async with nodes(durable, members=1, mutants=["lossy_relay"]) as them:
        run = them.run
        await them.follow(by_form(4, 50))
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


@pytest.mark.parametrize("mutant", [None, "freshness_from_the_clock"])
async def test_clients_of_gateways_miss_nothing_while_the_clocks_of_all_nodes_jump(
    durable: str, results: Results, mutant: str | None
) -> None:
    mutants = ["wild_clock", *([mutant] if mutant else [])]
    async with nodes(durable, mutants=mutants, mutants_of_members=["wild_clock"]) as them:
        await them.follow(by_form(4, 50))
        them.run.write(4)
        await them.run.committed(by_form(200, 5000))
        while mutant and not any(checker.warnings for checker in them.run.checkers):
            await asyncio.sleep(0.1)
        verdict = await them.run.verdict()
        warnings = sum(checker.warnings for checker in them.run.checkers)
    if mutant:
        results.caught("21 (gateways)", mutant, "clients are told `stale` while they get everything")
        return
    assert (CLEAN, 0) == (verdict, warnings)
    results.held(
        "21 (gateways)",
        "the clocks of members and gateways jump",
        "`time.time` is off by up to an hour, back or forth, at each call",
        "no order and no freshness depends on clocks; nothing lost or repeated, no reset, nobody is told `stale`",
        "",
        them.run.n,
    )


@pytest.mark.parametrize("mutant", ["no_prev", "no_fill"])
async def test_without_looking_at_what_a_batch_continues_gateways_lose_changes(
    durable: str, results: Results, mutant: str
) -> None:
    async with nodes(durable, members=1, mutants=["lossy_relay", mutant]) as them:
        await them.follow(2)
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


async def test_every_commit_reaches_clients_of_gateways_although_postgres_is_killed(results: Results) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with own_server() as server, nodes(server, members=1) as them:
        run = them.run
        await them.follow(by_form(4, 20))
        run.write(3)
        for _ in range(kills := by_form(1, 10)):
            await run.received(chance.randint(10, 100))
            began = time.monotonic()
            await server.crash()
            await server.start()
            await run.recovered()
            recoveries.append(time.monotonic() - began)
        verdict = await run.verdict(resets={"crash"})
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


async def test_clients_of_gateways_that_are_not_reset_keep_what_a_crash_undid(results: Results) -> None:
    async with own_server() as server, nodes(server, members=1, mutants=["no_reset"]) as them:
        run = them.run
        await them.follow(2)
        run.write(2, Style(pause=0.005, settings={"synchronous_commit": "off"}))
        await run.received(20)
        await server.suspend("walwriter")
        await run.received(60)
        await server.crash()
        await server.start()
        await run.committed(100)
        verdict = await run.verdict(resets={"crash"}, within=MUTANT_TIMEOUT)
    assert 0 < verdict.phantom
    results.caught("3 (gateways)", "no_reset", verdict)


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
