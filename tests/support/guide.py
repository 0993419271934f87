"""The code blocks of a guide, so that tests run what readers copy."""

import asyncio
import itertools
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(#+ .+?)$|^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(guide: str) -> list[tuple[str, str, str]]:
    """Every code block of a guide: the heading above it, its language, and its text."""
    found: list[tuple[str, str, str]] = []
    heading = ""
    for title, language, code in _FENCE.findall((ROOT / guide).read_text(encoding="utf-8")):
        if title:
            heading = title.lstrip("# ")
        else:
            found.append((heading, language, code))
    return found


def shell(program: str, code: str) -> list[str]:
    """The command that runs a block which needs this program. Skips the test where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"There is no {program} here: install {program}.")
    return ["bash", "-euc", code]


class Terminal:
    """A shell in which a reader types the blocks of a guide, one after the other. The first failure ends it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, directory: Path, environment: Mapping[str, str], *, within: Sequence[str] = ()
    ) -> AsyncIterator[Self]:
        """A shell in this directory. `within` is a command that runs its arguments elsewhere."""
        process = await asyncio.create_subprocess_exec(
            *within, "bash", "-eu", cwd=directory, env=environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield cls(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.communicate()

    async def run(self, code: str) -> str:
        """Run a block until it ends; returns what it printed."""
        end = f"end of block {next(self._numbers)}"
        self.start(f"{code}\necho {end}\n")
        return (await self.until(f"{end}\n")).removesuffix(f"{end}\n")

    def start(self, code: str) -> None:
        """Run a block without waiting for its end."""
        assert self._process.stdin
        self._process.stdin.write(code.encode())

    async def until(self, text: str) -> str:
        """Wait until a line contains this text; returns everything that was printed until then."""
        assert self._process.stdout
        printed = ""
        while text not in printed:
            line = await self._process.stdout.readline()
            assert line, f"the shell has ended:\n{printed}"
            printed += line.decode()
        return printed

    def interrupt(self) -> None:
        """Press Ctrl-C: end what runs in the foreground."""
        os.killpg(self._process.pid, signal.SIGINT)
