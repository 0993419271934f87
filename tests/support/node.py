"""Node, for the tests of the JavaScript client."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

OLDEST = 20
HAS_WEBSOCKET = 22  # older ones have it behind an option
NONE = f"There is no Node {OLDEST} or newer here: install nodejs."


@cache
def _version() -> int:
    node = shutil.which("node")
    if node is None:
        return 0
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"v(\d+)", version)
    return int(found[1]) if found else 0


def node(*arguments: str | Path) -> list[str]:
    """The command that runs Node with a WebSocket. Skips the test where there is none."""
    if _version() < OLDEST:
        pytest.skip(NONE)
    options = [] if _version() >= HAS_WEBSOCKET else ["--experimental-websocket", "--no-warnings"]
    return ["node", *options, *map(str, arguments)]


def npm() -> str:
    """The program npm. Skips the test where there is none."""
    found = shutil.which("npm")
    if found is None:
        pytest.skip("There is no npm here: install npm.")
    return found


def installed(folder: Path, package: str, script: Path) -> list[str]:
    """The command that runs a script that needs a package. Skips the test where that is not installed in `folder`."""
    if not (folder / "node_modules" / package).exists():
        pytest.skip(f"There is no {package} here: run npm install in {folder}.")
    return node(script)


def typescript(package: Path) -> list[str]:
    """The command that checks types. Skips the test where the package's dependencies are not installed."""
    return installed(package, "typescript", package / "node_modules/.bin/tsc")


class Script:
    """A running script that reads and writes lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def say(self, *values: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(values).encode() + b"\n")
        await self._process.stdin.drain()

    async def receive(self) -> Any:
        """The next line. Fails if the script has ended."""
        assert self._process.stdout
        line = await self._process.stdout.readline()
        assert line, "the script has ended"
        return json.loads(line)


@asynccontextmanager
async def running_script(*arguments: str | Path) -> AsyncIterator[Script]:
    """Run a script with Node until the block ends; it must then end by itself when its input does."""
    process = await asyncio.create_subprocess_exec(
        *node(*arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
    )
    try:
        yield Script(process)
        assert process.stdin
        process.stdin.close()
        async with asyncio.timeout(30):
            assert 0 == await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
