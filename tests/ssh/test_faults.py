"""What can go wrong with the SSH tunnel: one line for each thing, with its exit code."""

import asyncio
import re
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncssh
import pytest

import daemon.postgres
from daemon.core.errors import OperatorFault
from daemon.postgres import ssh
from daemon.postgres.connect import connect
from daemon.postgres.tunnel import through_tunnel
from daemon.settings import Settings
from tests.support.daemon import free_port
from tests.support.sshd import Sshd

URL = "postgresql://u@localhost/d"


def settings(sshd: Sshd, dsn: str = URL, **more: str) -> Settings:
    """Settings that lead through the server, with one attempt."""
    given: dict[str, Any] = sshd.environment(**{"DATABASE_URL": dsn, "SSH_ATTEMPTS": "1"} | more)
    return Settings(**given)


async def fault_of(chosen: Settings) -> tuple[int, str]:
    """The exit code and the message of the fault that opening the tunnel raises."""
    assert chosen.ssh_route
    with pytest.raises(OperatorFault) as caught:
        async with through_tunnel(chosen):
            pass
    assert not chosen.ssh_route.directory.exists()
    assert "\n" not in str(caught.value)
    return caught.value.exit_code, str(caught.value)


def fingerprint(key: asyncssh.SSHKey) -> str:
    return f"ssh-ed25519 {key.get_fingerprint()}"


async def test_a_refused_connection_names_host_and_port(sshd: Sshd) -> None:
    port = free_port()
    code, message = await fault_of(settings(sshd, SSH_PORT=str(port)))
    assert 10 == code
    assert message.startswith("SSH connection refused. Check host and port. Nothing answers at 127.0.0.1:")
    assert f":{port}: correct SSH_HOST and SSH_PORT" in message


async def test_a_host_with_several_addresses_that_all_refuse_is_refused(sshd: Sshd) -> None:
    code, message = await fault_of(settings(sshd, SSH_HOST="localhost", SSH_PORT=str(free_port())))
    assert (10, True) == (code, message.startswith("SSH connection refused. Check host and port. "))


async def test_an_unknown_host_is_named_with_the_reason(sshd: Sshd) -> None:
    code, message = await fault_of(settings(sshd, SSH_HOST="bastion.invalid"))
    assert 12 == code
    assert re.fullmatch(
        rf"SSH host not found\. Check DNS or host address\. bastion\.invalid:{sshd.port} has no address \(.+\): "
        r"correct SSH_HOST\.",
        message,
    )


@pytest.mark.parametrize(
    ("greeting", "option", "code", "expected"),
    [
        (b"", "connect_timeout", 19, "No answer from {} over SSH in time: "),
        (b"SSH-2.0-silent\r\n", "login_timeout", 19, "No answer from {} over SSH in time: "),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "", 10, "The SSH connection to {} failed ("),
    ],
)
async def test_a_server_that_is_silent_or_speaks_something_else_is_named(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch, greeting: bytes, option: str, code: int, expected: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        if option:
            await reader.read()
        writer.close()

    if option:
        monkeypatch.setattr(ssh, "OPTIONS", {**ssh.OPTIONS, option: 0.2})
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found, message = await fault_of(settings(sshd, SSH_PORT=str(port)))
    assert (code, True) == (found, message.startswith(expected.format(f"127.0.0.1:{port}"))), message


async def test_a_missing_key_file_is_named(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "none"
    message = f"SSH key file not found. Check SSH_KEY_PATH. There is no file {path}."
    assert (78, message) == await fault_of(settings(sshd, SSH_KEY_PATH=str(path)))


async def test_a_key_file_that_cannot_be_used_is_named_with_the_reason(sshd: Sshd, tmp_path: Path) -> None:
    encrypted, text = tmp_path / "encrypted", tmp_path / "text"
    sshd.write_key(encrypted, asyncssh.generate_private_key("ssh-ed25519"), "hunter2")
    text.write_text("not a key\n")
    needs = "it is encrypted, so set SSH_KEY_PASSPHRASE or SSH_KEY_PASSPHRASE_FILE"
    for path, passphrase, reason in [
        (encrypted, "", needs),
        (encrypted, "wrong-canary", "SSH_KEY_PASSPHRASE does not decrypt it"),
        (text, "", "it is not a private key"),
        (tmp_path, "", "Is a directory"),
    ]:
        more = {"SSH_KEY_PASSPHRASE": passphrase} if passphrase else {}
        found = await fault_of(settings(sshd, SSH_KEY_PATH=str(path), **more))
        assert (78, f"The SSH key {path} cannot be used: {reason}.") == found


async def test_an_encrypted_key_is_admitted_with_its_passphrase(sshd: Sshd, database: str, tmp_path: Path) -> None:
    sshd.write_key(tmp_path / "key", asyncssh.read_private_key(sshd.key), "hunter2")
    chosen = settings(sshd, database, SSH_KEY_PATH=str(tmp_path / "key"), SSH_KEY_PASSPHRASE="hunter2")
    async with through_tunnel(chosen):
        connection = await connect(chosen.require_dsn(), application_name="test", attempts=1)
        await connection.close()


async def test_a_key_that_the_server_does_not_know_is_not_admitted(sshd: Sshd, tmp_path: Path) -> None:
    sshd.write_key(tmp_path / "key", asyncssh.generate_private_key("ssh-ed25519"))
    code, message = await fault_of(settings(sshd, SSH_USER="nobody", SSH_KEY_PATH=str(tmp_path / "key")))
    assert 11 == code
    expected = f"{sshd.address} does not admit the user nobody with the key {tmp_path / 'key'}: correct SSH_USER or "
    assert message.startswith(expected)


async def test_an_unknown_host_key_and_a_changed_one_differ_and_show_the_fingerprint(
    sshd: Sshd, tmp_path: Path
) -> None:
    known, other = tmp_path / "known_hosts", asyncssh.generate_private_key("ssh-ed25519")
    chosen = settings(sshd, SSH_KNOWN_HOSTS=str(known))
    shown = fingerprint(sshd.host_key)
    known.write_text(sshd.known_host(other).replace("127.0.0.1", "192.0.2.1"))
    code, message = await fault_of(chosen)
    assert 76 == code
    assert f"The host key of {sshd.address} is not known ({shown}): " in message
    assert str(known) in message
    known.write_text(sshd.known_host(other))
    code, message = await fault_of(chosen)
    assert 76 == code
    assert f"The host key of {sshd.address} has changed ({shown}): " in message
    known.write_text(sshd.known_host(asyncssh.generate_private_key("ecdsa-sha2-nistp256")))
    code, message = await fault_of(chosen)
    assert 76 == code
    assert f"The host key of {sshd.address} has changed ({shown}): " in message
    known.write_text(f"{sshd.known_host(sshd.host_key)}\n@revoked {sshd.known_host(sshd.host_key)}")
    code, message = await fault_of(chosen)
    assert (10, True) == (code, "revoked" in message)


async def test_known_hosts_that_cannot_be_read_are_named(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    chosen = settings(sshd, SSH_KNOWN_HOSTS=str(path))
    remedy = f"put the key of SSH_HOST into {path}, or set SSH_KNOWN_HOSTS."
    assert (78, f"The known SSH hosts cannot be read (there is no file): {remedy}") == await fault_of(chosen)
    path.write_bytes(b"\xff\xfe")
    message = f"The known SSH hosts cannot be read (a line is not in their format): {remedy}"
    assert (78, message) == await fault_of(chosen)


@pytest.mark.parametrize("place", ["localhost:{port}", "%2Fnowhere:{port}"])
async def test_a_database_that_refuses_behind_ssh_is_named_with_the_ssh_host(sshd: Sshd, place: str) -> None:
    port = free_port()
    code, message = await fault_of(settings(sshd, f"postgresql://u@{place.format(port=port)}/d"))
    database = f"localhost:{port}" if place.startswith("localhost") else f"/nowhere/.s.PGSQL.{port}"
    assert 10 == code
    assert message.startswith(f"Nothing answers at {database} through {sshd.address} (")
    assert message.endswith("): start Postgres there, or correct the database URL.")


async def test_a_server_that_prohibits_forwarding_is_named(sshd: Sshd, database: str) -> None:
    await sshd.stop()
    await sshd.start("AllowTcpForwarding no", "AllowStreamLocalForwarding no")
    try:
        code, message = await fault_of(settings(sshd, URL))
        assert (14, True) == (code, message.startswith(f"{sshd.address} does not forward to localhost:5432 ("))
        code, message = await fault_of(settings(sshd, database))
        assert (10, True) == (code, "(open failed, or AllowStreamLocalForwarding is off)" in message)
    finally:
        await sshd.stop()
        await sshd.start()


async def test_a_directory_that_others_could_enter_is_not_used(sshd: Sshd, database: str) -> None:
    chosen = settings(sshd, database)
    assert chosen.ssh_route
    directory = chosen.ssh_route.directory
    directory.mkdir(mode=0o755)
    try:
        with pytest.raises(OperatorFault, match=r"belongs to another user.*set TMPDIR") as caught:
            async with through_tunnel(chosen):
                pass
    finally:
        directory.rmdir()
    assert 73 == caught.value.exit_code


async def test_a_missing_library_is_named_with_the_extra_that_has_it(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(daemon.postgres, "ssh")
    monkeypatch.delitem(sys.modules, "daemon.postgres.ssh")
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    message = "The SSH library is missing: install Rowcast with the extra ssh, or unset SSH_HOST."
    assert (41, message) == await fault_of(settings(sshd))


async def test_attempts_and_their_pause_follow_the_environment(sshd: Sshd) -> None:
    given: dict[str, Any] = sshd.environment(DATABASE_URL=URL)
    del given["SSH_KEY_PATH"]
    found = []
    for environment in ("development", "production"):
        route = Settings(**given, ROWCAST_ENVIRONMENT=environment).ssh_route
        assert route
        found.append((str(route.key).replace(str(Path.home()), "~"), route.attempts, route.retry_delay))
    assert [("~/.ssh/id_rsa", 3, 1.0), ("/etc/ssh/private_key", 5, 2.0)] == found


async def test_a_refusal_is_retried_as_often_as_the_settings_say(sshd: Sshd, database: str) -> None:
    attempts = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        more = {"SSH_PORT": str(port), "SSH_ATTEMPTS": "3", "SSH_RETRY_DELAY": "0.01"}
        code, _ = await fault_of(settings(sshd, database, **more))
    assert (10, 3) == (code, attempts)


def test_the_socket_of_the_database_is_reached_by_its_path(database: str) -> None:
    assert parse_qs(urlsplit(database).query)["host"][0].startswith("/")  # so that these tests forward to a path


@pytest.mark.parametrize("steps", range(3))
async def test_a_tunnel_that_is_closed_while_it_is_opened_again_ends(
    sshd: Sshd, database: str, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    authenticated = asyncio.Event()
    monkeypatch.setattr("daemon.postgres.ssh._Client.auth_completed", lambda _: authenticated.set())
    async with asyncio.timeout(30), through_tunnel(settings(sshd, database)):
        authenticated.clear()
        sshd.signal_sessions(signal.SIGKILL)
        await authenticated.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
