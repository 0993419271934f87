"""The peer that people build first: LISTEN, and the payload to every websocket as it is: no rights, no log."""

import asyncio
import os

import asyncpg
from websockets.asyncio.server import ServerConnection, broadcast, serve


async def main(dsn: str, port: int) -> None:
    """Relay the channel `relay` to whoever connects."""
    clients: set[ServerConnection] = set()

    async def attend(client: ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.discard(client)

    def relay(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        broadcast(clients, str(payload))

    listener = await asyncpg.connect(dsn)
    await listener.add_listener("relay", relay)
    async with serve(attend, "127.0.0.1", port, compression=None):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(os.environ["DATABASE_URL"], int(os.environ["PORT"])))
