"""The load client: websocket clients by the thousand, in C where there is a compiler, else in Python processes."""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.rig import BUILD, HERE, Broken, clean_environment, end, python

PROCESSES = 4  # of the load client in Python
ANSWER_TIMEOUT = 120.0  # seconds
OPEN_TIMEOUT = 900.0  # seconds, for all clients

Openings = Sequence[Sequence[str]]


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc")


async def build(name: str) -> Path | None:
    """The program of bench/NAME.c, built if it is not there yet; None without a compiler. Raises Broken."""
    source, program, cc = HERE / f"{name}.c", BUILD / name, compiler()
    if cc is None:
        return None
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = BUILD / f"{name}.{os.getpid()}"  # renamed, as another process may build, or run, the same
        compiling = await asyncio.create_subprocess_exec(
            cc, "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source), stderr=asyncio.subprocess.PIPE
        )
        _, complaints = await compiling.communicate()
        if compiling.returncode:
            raise Broken(f"{source.name} cannot be compiled: {complaints.decode()[-600:]}")
        fresh.rename(program)
    return program


class Tool:
    """A process that takes commands on stdin, a line each, and answers with JSON objects on stdout."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path) -> None:
        self._child, self._log = child, log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def say(self, line: str) -> None:
        """Give a command."""
        assert self._child.stdin
        self._child.stdin.write(f"{line}\n".encode())
        await self._child.stdin.drain()

    async def hear(self, within: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """The next answer. Raises Broken if the process has ended, or says nothing in so many seconds."""
        assert self._child.stdout
        try:
            async with asyncio.timeout(within):
                line = await self._child.stdout.readline()
        except TimeoutError:
            raise Broken("the load client does not answer: what it waits for does not come") from None
        if not line:
            raise Broken(f"the load client has ended: {self._log.read_text(errors='replace').strip()[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def tool(*command: str | Path) -> AsyncIterator[Tool]:
    """A running tool, ended at the end."""
    with tempfile.TemporaryDirectory(prefix="rowcast-bench-") as home:
        log = Path(home, "log")
        with log.open("wb") as complaints:
            child = await asyncio.create_subprocess_exec(
                *map(str, command),
                env=clean_environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
        try:
            yield Tool(child, log)
        finally:
            await end(child)


@dataclass(frozen=True)
class Mark:
    """What has come in so far. The latencies, in seconds, are those of a few clients; `at` is in nanoseconds."""

    clients: int
    rows: int
    frames: int
    bytes: int
    at: int
    cpu: float
    sampled: int
    p50: float
    p90: float
    p99: float
    worst: float


class Load:
    """Clients of one server, in one process or several. Clients are shared out evenly, the first ones first."""

    def __init__(self, tools: Sequence[Tool], shares: Sequence[int]) -> None:
        self._tools, self._shares = tools, shares
        self.clients = sum(shares)
        self._open = [0] * len(tools)

    async def open(self, count: int | None = None) -> None:
        """Open so many more clients, or all; returns when each of them follows its topics."""
        wanted = count if count is not None else self.clients - sum(self._open)
        for place, one in enumerate(self._tools):
            part = min(self._shares[place] - self._open[place], wanted)
            wanted -= part
            self._open[place] += part
            if part:
                await one.say(f"open {part}")
                await one.hear(OPEN_TIMEOUT)

    async def until(self, rows: int) -> int:
        """Wait until this many rows have come in for each client; when that was, in nanoseconds."""
        asked = [(one, share) for one, share in zip(self._tools, self._open, strict=True) if share]
        for one, share in asked:
            await one.say(f"until {rows * share}")
        return max([int((await one.hear())["at"]) for one, _ in asked])

    async def received(self, rows: int, within: float = ANSWER_TIMEOUT) -> Mark:
        """Wait until all clients together have so many rows. Raises Broken if there are more, or not in time."""
        deadline = asyncio.get_running_loop().time() + within
        while (mark := await self.mark()).rows < rows and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if mark.rows != rows:
            raise Broken(f"{rows} rows should have come in, and {mark.rows} did")
        return mark

    async def mark(self) -> Mark:
        """What has come in so far, and how long it took since the last `forget`."""
        marks = []
        for one in self._tools:
            await one.say("mark")
            marks.append(Mark(**await one.hear()))
        first, *others = marks
        return (
            replace(
                first,
                clients=sum(mark.clients for mark in marks),
                rows=sum(mark.rows for mark in marks),
                frames=sum(mark.frames for mark in marks),
                bytes=sum(mark.bytes for mark in marks),
                cpu=sum(mark.cpu for mark in marks),
                at=max(mark.at for mark in marks),
            )
            if others
            else first
        )

    async def forget(self) -> None:
        """Leave out the latencies that were noted so far."""
        for one in self._tools:
            await one.say("forget")


@asynccontextmanager
async def load(
    port: int, openings: Openings, *, path: str = "/", subprotocol: str | None = None, in_c: bool = True
) -> AsyncIterator[Load]:
    """Clients of the server at this port, none of them open yet; `openings` are the frames that each of them says."""
    program = await build("clients") if in_c else None
    command = [program] if program else [*python("bench.clients")]
    shares = split(len(openings), 1 if program else PROCESSES)
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rowcast-bench-")))
        tools, done = [], 0
        for place, share in enumerate(shares):
            file = home / f"openings.{place}"
            file.write_text("".join("\t".join(said) + "\n" for said in openings[done : done + share]))
            done += share
            tools.append(await stack.enter_async_context(tool(*command, str(port), path, subprotocol or "-", file)))
        yield Load(tools, shares)


def split(count: int, parts: int) -> list[int]:
    """Shares of `count`, as equal as can be, the empty ones left out."""
    shares = [count // parts + (place < count % parts) for place in range(parts)]
    return [share for share in shares if share]
