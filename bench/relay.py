"""The relay that people build first: it LISTENs and forwards each payload to every websocket; no rights, no log."""

import asyncio
import os

import asyncpg
from websockets.asyncio.server import ServerConnection, broadcast, serve


async def main(dsn: str, port: int) -> None:
    """Forward the channel `relay` to every client."""
    clients: set[ServerConnection] = set()

    async def handle(client: ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.discard(client)

    def relay(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        broadcast(clients, str(payload))

    listener = await asyncpg.connect(dsn)
    await listener.add_listener("relay", relay)
    async with serve(handle, "127.0.0.1", port, compression=None):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(os.environ["DATABASE_URL"], int(os.environ["PORT"])))
