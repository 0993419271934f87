"""A real OpenSSH server that forwards, run as the user of the tests."""

import asyncio
import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import asyncssh
import pytest

from tests.support.daemon import free_port
from tests.support.postgres import passable_directory

PLACES: Final = ("/usr/sbin", "/usr/local/sbin")
NONE: Final = "There is no OpenSSH server here: install it (Debian: apt install openssh-server)."
PRIVILEGE_SEPARATION: Final = Path("/run/sshd")  # a directory that sshd insists on if root runs it

CONFIGURATION = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""


class Sshd:
    """An OpenSSH server on a port of its own, with a user's key that it admits."""

    def __init__(self, program: str, directory: Path) -> None:
        self.port = free_port()
        self.key, self.known_hosts = directory / "key", directory / "known_hosts"
        self.host_key = asyncssh.generate_private_key("ssh-ed25519")
        self._program, self._directory = program, directory
        self._process: asyncio.subprocess.Process | None = None
        key = asyncssh.generate_private_key("ssh-ed25519")
        self.write_key(self.key, key)
        self.write_key(directory / "host_key", self.host_key)
        (directory / "authorized_keys").write_bytes(key.export_public_key())
        self.known_hosts.write_text(self.known_host(self.host_key))
        (directory / "sshd_config").write_text(CONFIGURATION.format(port=self.port, directory=directory))

    @staticmethod
    def write_key(path: Path, key: asyncssh.SSHKey, passphrase: str | None = None) -> None:
        """Write a private key that only its owner may read, as sshd demands of its own."""
        path.touch(mode=0o600)
        path.write_bytes(key.export_private_key("openssh", passphrase, rounds=50))

    def known_host(self, key: asyncssh.SSHKey) -> str:
        """A line of known_hosts for this server with this key."""
        return f"[127.0.0.1]:{self.port} {key.export_public_key().decode()}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        """The settings that lead through this server."""
        settings = {
            "SSH_HOST": "127.0.0.1",
            "SSH_PORT": str(self.port),
            "SSH_USER": getpass.getuser(),
            "SSH_KEY_PATH": str(self.key),
            "SSH_KNOWN_HOSTS": str(self.known_hosts),
        }
        return settings | more

    async def start(self, *options: str) -> None:
        """Start it, with more lines of configuration, and wait until it accepts connections."""
        chosen = [argument for option in (*options, *self._lenient()) for argument in ("-o", option)]
        with (self._directory / "log").open("wb") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *(self._program, "-D", "-e", "-f", str(self._directory / "sshd_config"), *chosen),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=log,
            )
        while process.returncode is None:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                await writer.wait_closed()
                return
            await asyncio.sleep(0)
        raise AssertionError((self._directory / "log").read_text())

    def _lenient(self) -> list[str]:
        """Newer servers refuse a client for a while after it has failed a few times."""
        option = "PerSourcePenalties no"
        test = [self._program, "-t", "-f", str(self._directory / "sshd_config"), "-o", option]
        return [] if subprocess.run(test, capture_output=True).returncode else [option]

    async def stop(self) -> None:
        """Stop it, with all of its connections."""
        if self._process is not None and self._process.returncode is None:
            self.signal_sessions(signal.SIGKILL)
            self._process.terminate()
            await self._process.wait()

    def connections(self) -> int:
        """The number of connections that were admitted since it was started."""
        return (self._directory / "log").read_text().count("Accepted publickey")

    def signal_sessions(self, number: signal.Signals) -> None:
        """Send a signal to the processes that serve its connections."""
        assert self._process is not None
        for pid in _descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _descendants(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield from _descendants(child)
            yield child


def find_sshd() -> str:
    """The program. Skips the test where it is not installed."""
    program = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if program is None:
        pytest.skip(NONE)
    return program


@asynccontextmanager
async def running_sshd() -> AsyncIterator[Sshd]:
    """A server that has started; it is stopped at the end."""
    program = find_sshd()
    if os.geteuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    with passable_directory() as directory:
        server = Sshd(program, directory)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()
