"""The load client: thousands of websocket clients, in C if there is a compiler, else in Python processes."""

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

from bench.rig import BUILD, HERE, MeasurementError, clean_environment, end, python

PROCESSES = 4  # of the load client in Python
ANSWER_TIMEOUT = 120.0  # seconds
OPEN_TIMEOUT = 900.0  # seconds, for all clients

Openings = Sequence[Sequence[str]]


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc")


async def build(name: str) -> Path | None:
    """The program of bench/NAME.c, compiled if necessary; None without a compiler. Raises MeasurementError."""
    source, program, cc = HERE / f"{name}.c", BUILD / name, compiler()
    if cc is None:
        return None
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = BUILD / f"{name}.{os.getpid()}"  # then renamed: another process may build or run it
        compiling = await asyncio.create_subprocess_exec(
            cc, "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await compiling.communicate()
        if compiling.returncode:
            raise MeasurementError(f"{source.name} cannot be compiled: {errors.decode()[-600:]}")
        fresh.rename(program)
    return program


class Tool:
    """A process that reads commands from stdin, one a line, and answers with JSON objects on stdout."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path) -> None:
        self._child, self._log = child, log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def send(self, line: str) -> None:
        """Send a command."""
        assert self._child.stdin
        self._child.stdin.write(f"{line}\n".encode())
        await self._child.stdin.drain()

    async def receive(self, timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109 - in seconds
        """The next answer. Raises MeasurementError if the process has ended, or does not answer within `timeout`."""
        assert self._child.stdout
        try:
            async with asyncio.timeout(timeout):
                line = await self._child.stdout.readline()
        except TimeoutError:
            raise MeasurementError("the load client does not answer: what it waits for does not arrive") from None
        if not line:
            raise MeasurementError(
                f"the load client has ended: {self._log.read_text(errors='replace').strip()[-600:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def tool(*command: str | Path) -> AsyncIterator[Tool]:
    """A running tool, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="rowcast-bench-") as home:
        log = Path(home, "log")
        with log.open("wb") as errors:
            child = await asyncio.create_subprocess_exec(
                *map(str, command),
                env=clean_environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        try:
            yield Tool(child, log)
        finally:
            await end(child)


@dataclass(frozen=True)
class Mark:
    """What has arrived so far. Latencies (of a few clients) are in seconds, `at` (the last read) in nanoseconds."""

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
    """Clients of one server, distributed evenly over one or more processes, and opened in order."""

    def __init__(self, tools: Sequence[Tool], shares: Sequence[int]) -> None:
        self._tools, self._shares = tools, shares
        self.clients = sum(shares)
        self._open = [0] * len(tools)

    @classmethod
    def of(cls, loads: "Sequence[Load]") -> "Load":
        """The clients of several servers, none of them open yet."""
        return cls(
            [one for load in loads for one in load._tools], [share for load in loads for share in load._shares]
        )

    async def open(self, count: int | None = None) -> None:
        """Open `count` further clients, or all; returns when each of them follows its topics."""
        await self._begin("open", count if count is not None else self.clients - sum(self._open))

    async def connect(self) -> None:
        """Open all clients, but keep back what each sends after its first frame; returns when that is answered."""
        await self._begin("connect", self.clients - sum(self._open))

    async def ask(self) -> None:
        """Send at once what all clients have kept back."""
        for one in self._tools:
            await one.send("ask")

    async def _begin(self, command: str, wanted: int) -> None:
        for place, one in enumerate(self._tools):
            part = min(self._shares[place] - self._open[place], wanted)
            wanted -= part
            self._open[place] += part
            if part:
                await one.send(f"{command} {part}")
                await one.receive(OPEN_TIMEOUT)

    async def until(self, rows: int) -> int:
        """Wait until each client has received this many rows; returns when that was, in nanoseconds."""
        return await self._reach("until", rows)

    async def _reach(self, command: str, rows: int) -> int:
        for one, share in self._waiting():
            await one.send(f"{command} {rows * share}")
        return max([int((await one.receive())["at"]) for one, _ in self._waiting()])

    def _waiting(self) -> list[tuple[Tool, int]]:
        """The processes with open clients, and how many each has."""
        return [(one, share) for one, share in zip(self._tools, self._open, strict=True) if share]

    async def pause(self) -> None:
        """Have the clients read nothing until `gather`; those in Python go on reading."""
        for one, _ in self._waiting():
            await one.send("pause")
            await one.receive()

    async def gather(self, rows: int) -> int:
        """The same as `until`, but nothing is read before something has arrived for each client.

        The clients cost next to nothing until then. Returns when the last of it arrived, not when it was read.
        """
        return await self._reach("gather", rows)

    async def received(self, rows: int, within: float = ANSWER_TIMEOUT) -> Mark:
        """Wait until all clients together have this many rows. Raises MeasurementError if more or fewer arrive."""
        deadline = asyncio.get_running_loop().time() + within
        while (mark := await self.mark()).rows < rows and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if mark.rows != rows:
            raise MeasurementError(f"{rows} rows should have arrived, and {mark.rows} did")
        return mark

    async def mark(self) -> Mark:
        """What has arrived so far, with the latencies since the last `forget`."""
        marks = []
        for one in self._tools:
            await one.send("mark")
            marks.append(Mark(**await one.receive()))
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
        """Discard the latencies recorded so far."""
        for one in self._tools:
            await one.send("forget")


@asynccontextmanager
async def load(
    port: int, openings: Openings, *, path: str = "/", subprotocol: str | None = None, in_c: bool = True
) -> AsyncIterator[Load]:
    """Clients of the server at this port, none of them open yet; `openings` are the frames that each client sends."""
    program = await build("clients") if in_c else None
    command = [program] if program else [*python("bench.clients")]
    shares = split(len(openings), 1 if program else PROCESSES)
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rowcast-bench-")))
        tools, done = [], 0
        for place, share in enumerate(shares):
            file = home / f"openings.{place}"
            file.write_text("".join("\t".join(frames) + "\n" for frames in openings[done : done + share]))
            done += share
            tools.append(await stack.enter_async_context(tool(*command, str(port), path, subprotocol or "-", file)))
        yield Load(tools, shares)


def split(count: int, parts: int) -> list[int]:
    """Split `count` into `parts` shares that differ by at most one; empty shares are left out."""
    shares = [count // parts + (place < count % parts) for place in range(parts)]
    return [share for share in shares if share]
