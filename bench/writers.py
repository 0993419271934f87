"""The writers: pgbench if the server's programs include it, else asyncpg in several processes."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from bench.data import CHANNELS, INSERT, channel, user
from bench.rig import HERE, MeasurementError, clean_environment, python
from daemon.embedded.binaries import find_binaries

PROCESSES = 2  # of the writer in Python


@dataclass(frozen=True)
class Written:
    """The number of rows, and the seconds that they took."""

    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def pgbench() -> Path | None:
    """The server's own pgbench, if it has one."""
    program = find_binaries().bindir / "pgbench"
    return program if program.exists() else None


async def write(
    dsn: str,
    *,
    clients: int,
    seconds: float,
    channels: int = CHANNELS,
    authors: int = CHANNELS,
    rate: float | None = None,
    rows: int = 1,
    by_pgbench: bool = True,
) -> Written:
    """Insert messages, `rows` in each transaction, at random into the first channels and from the first authors.

    `rate` is in transactions a second for all clients together; without one they write at full speed.

    Raises MeasurementError.
    """
    program = pgbench() if by_pgbench else None
    if program is None:
        return await _write_with_asyncpg(dsn, clients, seconds, channels, authors, rate or 0, rows)
    arguments = ["-n", "-M", "prepared", "-c", clients, "-j", min(clients, 2), "-T", max(1, round(seconds))]
    script = HERE / ("messages.pgbench" if rows == 1 else "transactions.pgbench")
    arguments += ["-D", f"channels={channels}", "-D", f"authors={authors}", "-D", f"rows={rows}", "-f", script]
    arguments += ["-R", rate] if rate else []
    output = await _run([str(program), *map(str, arguments)], libpq(dsn))
    processed = re.search(r"actually processed: (\d+)", output)
    speed = re.search(r"tps = ([\d.]+)", output)
    failed = re.search(r"failed transactions: ([1-9]\d*)", output)
    if processed and processed[1] == "0":
        raise MeasurementError(f"in {seconds:g} s not one transaction was committed")
    if not processed or not speed or failed or "aborted" in output:
        raise MeasurementError(f"pgbench failed: {output[-600:]}")
    transactions = int(processed[1])
    return Written(transactions * rows, transactions / float(speed[1]) if float(speed[1]) else seconds)


async def _write_with_asyncpg(
    dsn: str, clients: int, seconds: float, channels: int, authors: int, rate: float, rows: int
) -> Written:
    parts = min(PROCESSES, clients)
    arguments = [str(word) for word in (clients // parts, seconds, channels, authors, rate / parts, rows)]
    output = await asyncio.gather(
        *(_run([*python("bench.writer"), *arguments], {"DATABASE_URL": dsn}) for _ in range(parts))
    )
    return Written(sum(int(one.split()[-1]) for one in output), seconds)


async def _run(command: list[str], environment: dict[str, str]) -> str:
    child = await asyncio.create_subprocess_exec(
        *command,
        env=clean_environment(**environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise MeasurementError(f"{Path(command[0]).name} ended with {child.returncode}: {output.decode()[-600:]}")
    return output.decode()


def libpq(dsn: str) -> dict[str, str]:
    """The environment that Postgres programs connect with. Their command line would expose the password."""
    parts = urlsplit(dsn)
    options = parse_qs(parts.query)
    return {
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": unquote(parts.path[1:]),
        "PGHOST": options["host"][0],
        "PGPORT": options["port"][0],
    }


async def evenly(
    dsn: str,
    *,
    rate: float,
    seconds: float,
    channels: int = 1,
    after_each: Callable[[int], Awaitable[object]] | None = None,
) -> Written:
    """Insert single messages at even intervals, into each of the first channels in turn.

    `after_each` is awaited after each message, with their number so far; it may delay the next one.
    """
    connection = await asyncpg.connect(dsn)
    try:
        insert = await connection.prepare(INSERT)
        began, rows = time.monotonic(), round(rate * seconds)
        for number in range(rows):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            await insert.fetch(channel(number % channels), user(0), 1)
            if after_each is not None:
                await after_each(number + 1)
        return Written(rows, time.monotonic() - began)
    finally:
        await connection.close()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))
