"""A machine with systemd as its process 1, made of namespaces: what an operator does as root is done there."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from tests.support.guide import Terminal

PROGRAMS = ("unshare", "nsenter", "pivot_root", "ip", "systemctl", "dbus-daemon", "pg_createcluster", "curl")
SYSTEMD = Path("/lib/systemd/systemd")
SCRIPT = Path(__file__).with_suffix(".sh")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
NEW_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net")


class Machine:
    """A machine that has booted. Whatever happens there changes nothing here, and is forgotten at the end."""

    def __init__(self, init: int) -> None:
        self._enter = ("nsenter", "--target", str(init), "--all", "--root", "--wd")
        self.root = Path(f"/proc/{init}/root")  # its files, as seen from here

    @classmethod
    @asynccontextmanager
    async def booted(cls) -> AsyncIterator[Self]:
        """Boot, and stop at the end. Skips the test where this account or this system cannot do that."""
        group = _group()
        group.mkdir()
        with tempfile.TemporaryDirectory() as directory:
            process = await asyncio.create_subprocess_exec(
                *("bash", "-euc", f'echo $$ > {group}/cgroup.procs; exec "$@"', "bash"),
                *("unshare", *NEW_NAMESPACES, "--fork", "--kill-child", "bash", str(SCRIPT), directory),
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                assert process.stdout
                assert b"booting\n" == await process.stdout.readline()
                init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
                machine = cls(init)
                while not (machine.root / "run/systemd/private").exists():
                    await asyncio.sleep(0.01)
                await machine.run("systemctl", "is-system-running", "--wait")
                yield machine
            finally:
                process.kill()  # its processes end with it
                await process.wait()
                await _remove(group)

    @asynccontextmanager
    async def terminal(self, **environment: str) -> AsyncIterator[Terminal]:
        """A shell of root."""
        async with Terminal.opened(Path("/"), ENVIRONMENT | environment, within=self._enter) as terminal:
            yield terminal

    async def run(self, *command: str) -> str:
        """Run a program, which must succeed; returns its output."""
        process = await asyncio.create_subprocess_exec(
            *self._enter, *command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert 0 == process.returncode, output.decode()
        return output.decode()


def _group() -> Path:
    """A control group for the machine. Skips the test where there can be no machine."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or not SYSTEMD.exists() or os.geteuid() != 0:
        pytest.skip(f"No machine of namespaces here: be root, and install systemd and PostgreSQL ({missing}).")
    if _version_of("/usr/bin/python3") != _version_of(sys.executable):
        pytest.skip("The libraries of these tests are for another Python than that of root.")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    groups = [place for _, place, kind, *_ in mounts if kind == "cgroup2"]
    tried = subprocess.run(["unshare", *NEW_NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()])
    if not groups or tried.returncode != 0:
        pytest.skip("This system lets nobody make namespaces, or has no control groups.")
    return Path(groups[0], f"rowcast-{os.getpid()}")


def _version_of(python: str) -> str:
    found = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    return found.stdout


async def _remove(group: Path) -> None:
    """Remove a control group as soon as its last process has ended."""
    while group.exists():
        for folder, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()
        await asyncio.sleep(0.01)
