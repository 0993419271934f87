"""A gateway that is set up wrongly says why in one line, is not ready, and begins by itself when that is mended."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from daemon.app import serve
from daemon.app.serve import Running, gateway_running
from daemon.core import epochs
from daemon.relay import link as links
from daemon.settings import Settings
from tests.support.daemon import SECRET, Daemon, free_port, get
from tests.support.gateways import member
from tests.support.issuer import self_signed
from tests.support.listening import stop_accepting
from tests.support.nats import Issuer, NatsServer, running_link, running_nats
from tests.support.postgres import Server

PREFIX = "bad"
MAY = 'publish: ["bad.q.*", "bad.signals"], subscribe: ["bad.log", "bad.beat", "bad.signals", "bad.a.>"]'


@dataclass
class Hub:
    """A NATS server with a member, to which other servers can be joined as leaf nodes."""

    nats: NatsServer
    leaf_port: int
    member: Daemon

    def joined(self, more: str) -> str:
        """The configuration of a server that passes on what the hub's member sends."""
        return f'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{self.leaf_port}" }}] }}\n{more}'


MEMBER = """
leafnodes {{ listen: "127.0.0.1:{port}" }}
member {{ publish: {{ deny: [{denied}] }}, subscribe: {{ deny: [{deaf}] }} }}
authorization {{ users = [{{ user: member, password: member, permissions: $member }}] }}
no_auth_user: member
"""


@pytest.fixture(scope="module")
async def hub(postgres: Server) -> AsyncIterator[Hub]:
    leaf_port = free_port()
    configuration = MEMBER.format(port=leaf_port, denied="", deaf="")
    async with (
        postgres.chatgenius() as dsn,
        running_nats(configuration) as nats,
        member(dsn, nats.url, PREFIX) as one,
    ):
        yield Hub(nats, leaf_port, one)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated is repeated soon."""
    monkeypatch.setattr(serve, "MEMBER_TIMEOUT", 0.2)
    monkeypatch.setattr(links, "RETRY_REFUSED", 0.5)
    monkeypatch.setattr(links, "MAX_DELAY", 0.2)


@dataclass
class Beginning:
    """A gateway of this process, and why it has not begun, or is not ready."""

    logs: list[Any]
    running: Running | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def problems(self) -> list[str]:
        if self.running is not None:
            return self.running.readiness.reasons()
        return [line["reason"] for line in self.logs if line["event"] == "waiting_for_members"][-1:]

    async def until_problem(self, pattern: str) -> None:
        while not any(re.search(pattern, problem) for problem in self.problems):
            await asyncio.sleep(0.01)
        assert all("\n" not in problem for problem in self.problems)

    async def until_ready(self) -> None:
        while self.running is None or self.problems:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def beginning(url: str, **given: Any) -> AsyncIterator[Beginning]:
    variables = {f"ROWCAST_{name.upper()}": value for name, value in given.items()}
    settings = Settings(
        **{"ROWCAST_NATS_PREFIX": PREFIX, **variables},
        ROWCAST_NATS_URL=url,
        ROWCAST_SECRET=SECRET,
        ROWCAST_LISTEN="127.0.0.1:0",
        ROWCAST_DRAIN_SECONDS=0,
    )
    with capture_logs() as logs:
        found = Beginning(logs)

        async def run() -> None:
            async with gateway_running(settings) as found.running:
                await found.ended.wait()

        running = asyncio.create_task(run())
        try:
            yield found
        finally:
            if found.running is None:
                running.cancel()
            found.ended.set()
            await asyncio.wait({running})


@dataclass
class Case:
    """A gateway's URL and settings, what its server is configured with before and after, and what mends the rest."""

    reason: str
    wrong: str = ""
    right: str = ""
    url: str = "nats://{address}"
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_restart: bool = False  # what a reload of the server cannot change
    mend: Callable[[], object] = lambda: None


def password(word: str, permissions: str = MAY) -> str:
    return f"authorization {{ users = [{{ user: gate, password: {word}, permissions: {{ {permissions} }} }}] }}"


def tls(folder: Path, more: str = "") -> str:
    return f'tls {{ cert_file: "{folder}/certificate.pem", key_file: "{folder}/key.pem"{more} }}'


def cases(folder: Path) -> dict[str, Case]:
    """All that is wrong with servers, credentials, certificates and permissions."""
    other, issuer = folder / "other", Issuer()
    other.mkdir()
    cert, _ = self_signed(folder)
    self_signed(other)
    trusted = {"nats_ca_file": cert}
    mine = "nats://gate:right@{address}"

    def copy() -> None:
        (other / "certificate.pem").write_bytes(cert.read_bytes())

    def permitted(subject: str, kind: str) -> Case:
        without = MAY.replace(f'"{subject}"', '"none"')
        shown = re.escape(subject.replace("*", "").replace(">", ""))
        return Case(
            f'NATS does not permit this node to {kind} to "{shown}',
            password("right", without),
            password("right"),
            mine,
        )

    return {
        "another password": Case("refuses the credentials", password("wrong"), password("right"), mine),
        "no password": Case("refuses the credentials", password("right"), ""),
        "no credentials": Case(
            "cannot read the credentials in .*: No such file",
            settings={"nats_creds_file": folder / "node.creds"},
            mend=lambda: (folder / "node.creds").write_text(issuer.credentials()),
        ),
        "an unknown authority": Case(
            "the certificate of .* is not valid: ",
            tls(folder),
            tls(folder),
            settings={"nats_ca_file": other / "certificate.pem"},
            mend=copy,
        ),
        "an expired certificate": Case(
            "the certificate of .* is not valid: certificate has expired",
            tls(folder),
            tls(folder),
            settings=trusted,
            mend=lambda: self_signed(folder),
        ),
        "TLS that the server does not offer": Case(
            "offers no TLS, which the URL or the certificates in the settings demand",
            "",
            tls(folder),
            "tls://{address}",
            trusted,
            is_restart=True,
        ),
        "TLS of which the gateway knows nothing": Case(
            "the certificate of .* is not valid: ", tls(folder), "", is_restart=True
        ),
        "a certificate that the gateway lacks": Case(
            "TLS with .* failed: |closed the connection",
            tls(folder, f', ca_file: "{cert}", verify: true'),
            tls(folder),
            settings=trusted,
            is_restart=True,
        ),
        "small messages": Case("set its max_payload to 524288 or more", "max_payload: 65536", "", is_restart=True),
        "no subscription to beats": permitted("bad.beat", "subscribe"),
        "no subscription to the log": permitted("bad.log", "subscribe"),
        "no subscription to answers": permitted("bad.a.>", "subscribe"),
        "no questions": permitted("bad.q.*", "publish"),
    }


NAMES = [
    "another password", "no password", "no credentials", "an unknown authority", "an expired certificate",
    "TLS that the server does not offer", "TLS of which the gateway knows nothing",
    "a certificate that the gateway lacks", "small messages", "no subscription to beats",
    "no subscription to the log", "no subscription to answers", "no questions",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_a_gateway_says_what_is_wrong_and_begins_when_that_is_mended(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    found = cases(tmp_path)
    assert NAMES == [*found]
    case = found[name]
    if name == "an expired certificate":
        self_signed(tmp_path, days=-1)
    async with (
        running_nats(hub.joined(case.wrong)) as server,
        beginning(case.url.format(address=server.address), **case.settings) as one,
    ):
        await one.until_problem(case.reason)
        case.mend()
        await configure(server, hub.joined(case.right), is_restart=case.is_restart)
        await one.until_ready()
        codes = {line["event"] for line in one.logs if line["log_level"] in {"warning", "error"}}
        assert codes & {"waiting_for_members", "relay_lost", "relay_refused"}


async def configure(server: NatsServer, configuration: str, *, is_restart: bool) -> None:
    server.configure(configuration)
    if is_restart:
        await server.kill()
        await server.start()
    else:
        server.signal(signal.SIGHUP)


async def test_a_gateway_waits_for_a_server_that_is_not_there_yet(hub: Hub) -> None:
    async with running_nats(hub.joined("")) as server:
        await server.kill()
        async with beginning(server.url) as one:
            await one.until_problem(f"nothing listens at {server.address}")
            await server.start()
            await one.until_ready()


async def test_a_gateway_says_that_something_else_listens_where_nats_should(hub: Hub) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-none\r\n")
        await reader.read()
        writer.close()

    async with running_nats(hub.joined("")) as server:
        await server.kill()
        async with beginning(server.url) as one:
            other = await asyncio.start_server(greet, "127.0.0.1", server.port)
            await one.until_problem(f"what listens at {server.address} is no NATS server")
            await stop_accepting(other)
            await server.start()
            await one.until_ready()


async def test_a_gateway_that_has_another_prefix_says_that_no_member_sends_beats(hub: Hub) -> None:
    async with beginning(hub.nats.url, nats_prefix="elsewhere") as one:
        await one.until_problem("no member sends beats: .*ROWCAST_NATS_PREFIX")


async def test_a_gateway_says_at_its_start_that_members_have_another_version(hub: Hub) -> None:
    async with beginning(hub.nats.url, nats_prefix="newer") as one, running_link(hub.nats.url, "newer") as link:
        await link.connected.wait()
        while not any("run the same version of Rowcast on all nodes" in problem for problem in one.problems):
            link.publish("beat", b"\2\0\0\0\2[]")
            await asyncio.sleep(0.05)
        assert 1 == len([line for line in one.logs if line["event"] == "relay_unreadable"])


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"denied": '"bad.beat"', "deaf": ""}, 'publish to "bad.beat"'),
        ({"denied": "", "deaf": '"bad.q.*"'}, 'subscribe to "bad.q.'),
    ],
)
async def test_a_member_says_what_nats_forbids_it_and_gateways_begin_when_it_may(
    hub: Hub, refused: dict[str, str], says: str
) -> None:
    hub.nats.configure(MEMBER.format(port=hub.leaf_port, **refused))
    hub.nats.signal(signal.SIGHUP)
    try:
        while says not in str(json.loads((page := await get(f"{hub.member.http}/readyz"))[1]).get("warnings")):
            await asyncio.sleep(0.1)
        assert 200 == page[0], "its own clients are served"
        assert any(says in line["data"]["reason"] for line in hub.member.events() if line["event"] == "relay_refused")
        async with beginning(hub.nats.url) as one:
            await one.until_problem("no member|No member")
            hub.nats.configure(MEMBER.format(port=hub.leaf_port, denied="", deaf=""))
            hub.nats.signal(signal.SIGHUP)
            await one.until_ready()
    finally:
        hub.nats.configure(MEMBER.format(port=hub.leaf_port, denied="", deaf=""))
        hub.nats.signal(signal.SIGHUP)


async def test_a_gateway_says_that_members_of_two_databases_have_the_same_prefix(
    postgres: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "MAX_FAILOVER", 1.0)
    async with beginning(hub.nats.url) as one:
        await one.until_ready()
        async with postgres.chatgenius() as dsn, member(dsn, hub.nats.url, PREFIX):
            await one.until_problem("give each database a ROWCAST_NATS_PREFIX of its own")
            while not any(line["event"] == "relay_mixed" for line in one.logs):
                await asyncio.sleep(0.01)  # it is logged at the next check; the page says it at once
        await one.until_ready()
        assert 1 == len([line for line in one.logs if line["event"] == "relay_mixed"])


async def test_a_gateway_that_has_members_of_two_databases_does_not_begin_with_either(
    postgres: Server, hub: Hub
) -> None:
    async with postgres.chatgenius() as dsn, AsyncExitStack() as stack:
        async with member(dsn, hub.nats.url, PREFIX):
            one = await stack.enter_async_context(beginning(hub.nats.url))
            await one.until_problem("give each database a ROWCAST_NATS_PREFIX of its own")
            assert one.running is None
        await one.until_ready()


async def test_nodes_with_credentials_of_another_operator_say_so_until_they_have_the_right_ones(
    postgres: Server, tmp_path: Path
) -> None:
    issuer, creds = Issuer(), tmp_path / "node.creds"
    creds.write_text(Issuer().credentials())
    refused = "refuses the credentials"
    async with (
        postgres.chatgenius() as dsn,
        running_nats(issuer.configuration()) as server,
        member(dsn, server.url, PREFIX, ROWCAST_NATS_CREDS_FILE=str(creds)) as here,
        beginning(server.url, nats_creds_file=creds) as one,
    ):
        await one.until_problem(refused)
        assert one.running is None
        while refused not in str(json.loads((page := await get(f"{here.http}/readyz"))[1]).get("warnings")):
            await asyncio.sleep(0.1)
        assert 200 == page[0], "its own clients are served"
        lost = [line["data"]["reason"] for line in here.events() if line["event"] == "relay_lost"]
        assert 1 == len(lost)
        creds.write_text(issuer.credentials())
        await one.until_ready()
