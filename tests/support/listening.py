"""Servers of the tests' own."""

import asyncio


async def stop_accepting(server: asyncio.Server) -> None:
    """Close a server whose peers may be connecting just now.

    What it has accepted gets its task first: otherwise its transport would stay open, which fails a later test.
    """
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    for _ in range(5):
        await asyncio.sleep(0)
    server.close()
