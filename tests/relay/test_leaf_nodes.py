"""A gateway behind a leaf node of a cluster of three, with TLS and passwords, as the files in systemd say."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from daemon.files import folder
from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import free_port
from tests.support.gateways import follow, gateway, heartbeat, member, read
from tests.support.issuer import self_signed
from tests.support.nats import Issuer, NatsServer, find_nats_server, running_nats

FILES = "nats-server.conf", "nats-leaf.conf"


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


class Machines:
    """The ports that stand for the machines of the files, and one certificate for all."""

    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = self_signed(directory)
        self._ports = {f"nats-{n}.internal:{port}": free_port() for n in (1, 2, 3) for port in (6222, 7422)}

    def configuration(self, name: str, number: int = 1) -> str:
        """The text of a file, for the server of this number."""
        text = (folder("systemd") / name).read_text().replace('"nats-1"', f'"nats-{number}"')
        text = re.sub(r"/etc/nats/(certificate|ca)\.pem", str(self.certificate), text)
        text = text.replace("/etc/nats/key.pem", str(self.key))
        for port in (6222, 7422):
            text = text.replace(f"0.0.0.0:{port}", f"127.0.0.1:{self._ports[f'nats-{number}.internal:{port}']}")
        return re.sub(r"nats-\d\.internal:\d+", lambda found: f"127.0.0.1:{self._ports[found[0]]}", text)


@pytest.mark.parametrize("name", FILES)
async def test_nats_accepts_the_files_that_configure_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(Machines(tmp_path).configuration(name))
    process = await asyncio.create_subprocess_exec(
        *(find_nats_server(), "-t", "-c", str(file)), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert 0 == process.returncode, errors.decode()


@asynccontextmanager
async def cluster_with_leaf(machines: Machines) -> AsyncIterator[tuple[list[NatsServer], NatsServer]]:
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running_nats(machines.configuration("nats-server.conf", number)))
            for number in (1, 2, 3)
        ]
        yield servers, await stack.enter_async_context(running_nats(machines.configuration("nats-leaf.conf")))


async def test_clients_of_a_gateway_behind_a_leaf_node_miss_nothing_when_servers_of_the_cluster_are_killed(
    database: str, chat: Chat, tmp_path: Path
) -> None:
    machines = Machines(tmp_path)
    async with cluster_with_leaf(machines) as (servers, leaf), AsyncExitStack() as stack:
        urls = ",".join(f"tls://member:PASSWORD@{server.address}" for server in servers)
        one = await stack.enter_async_context(
            member(database, urls, "chat", ROWCAST_NATS_CA_FILE=str(machines.certificate))
        )
        two = await stack.enter_async_context(gateway(f"nats://gateway:PASSWORD@{leaf.address}", "chat"))
        near, far = [await follow(stack, node, chat) for node in (one, two)]
        for sender, other in ((near, far), (far, near)):
            await sender.say(op="signal", topic=chat.topic, name="typing")
            assert "signal" == (await other.next())["op"]
        for server in (*servers, leaf):
            await server.kill()
            for number in range(5):
                await chat.say(str(number))
            if server is leaf:
                await server.start()
            assert [*map(str, range(5))] == await read(far, "4")
            if server is not leaf:
                await server.start()
        while (await heartbeat(far)).get("stale"):
            pass
        assert [] == [event for node in (one, two) for event in node.warnings() if event["event"] == "relay_refused"]


def subjects_of(user: str, prefix: str) -> dict[str, list[str]]:
    """What docs/scale.md lets this user publish, and subscribe to."""
    text = (folder("docs") / "scale.md").read_text()
    found = re.search(rf"user: {user}, .*?publish: \[(.*?)\]\s+subscribe: \[(.*?)\]", text, re.DOTALL)
    assert found
    lists = [re.findall(r'"chat\.(.*?)"', group) for group in found.groups()]
    return {
        kind: [f"{prefix}.{subject}" for subject in each]
        for kind, each in zip(("publish", "subscribe"), lists, strict=True)
    }


async def test_members_gateways_and_leaf_nodes_show_files_with_credentials(
    database: str, chat: Chat, tmp_path: Path, prefix: str
) -> None:
    issuer, port, files = Issuer(), free_port(), {}
    for name in ("member", "gateway", "leaf"):
        files[name] = tmp_path / f"{name}.creds"
        permitted = {} if name == "leaf" else subjects_of(name, prefix)
        files[name].write_text(issuer.credentials(**permitted))
    remote = f'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{port}", credentials: "{files["leaf"]}" }}] }}'
    async with (
        running_nats(f'{issuer.configuration()}\nleafnodes {{ listen: "127.0.0.1:{port}" }}') as server,
        running_nats(remote) as leaf,
        member(database, server.url, prefix, ROWCAST_NATS_CREDS_FILE=str(files["member"])) as one,
        gateway(server.url, prefix, ROWCAST_NATS_CREDS_FILE=str(files["gateway"])) as two,
        gateway(leaf.url, prefix) as three,
        AsyncExitStack() as stack,
    ):
        clients = [await follow(stack, node, chat) for node in (one, two, three)]
        await chat.say("to all")
        for client in clients:
            assert ["to all"] == await read(client, "to all")
        assert [] == [event for node in (one, two, three) for event in node.warnings() if "relay" in event["event"]]
