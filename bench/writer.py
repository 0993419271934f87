"""The writer for machines without pgbench: CLIENTS SECONDS CHANNELS AUTHORS RATE ROWS.

Prints how many rows it wrote.
"""

import asyncio
import os
import random
import sys
import time

import asyncpg

from bench.data import INSERT, channel, user


async def write(
    dsn: str, clients: int, seconds: float, channels: int, authors: int, rate: float, together: int
) -> int:
    """Insert messages, `together` in each transaction, until the time is over.

    `rate` is in transactions a second, 0 for full speed.
    """

    async def one(connection: asyncpg.Connection) -> int:
        insert = await connection.prepare(INSERT)
        due, rows = time.monotonic(), 0
        while time.monotonic() < end:
            if rate:
                due += random.expovariate(rate / clients)
                await asyncio.sleep(max(0.0, min(due, end) - time.monotonic()))
            await insert.fetch(channel(random.randrange(channels)), user(random.randrange(authors)), together)
            rows += together
        return rows

    connections = [await asyncpg.connect(dsn) for _ in range(clients)]
    end = time.monotonic() + seconds
    try:
        return sum(await asyncio.gather(*map(one, connections)))
    finally:
        for connection in connections:
            await connection.close()


if __name__ == "__main__":
    clients, seconds, channels, authors, rate, rows = map(float, sys.argv[1:])
    dsn = os.environ["DATABASE_URL"]
    print(asyncio.run(write(dsn, int(clients), seconds, int(channels), int(authors), rate, int(rows))))
