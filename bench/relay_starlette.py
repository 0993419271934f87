"""The relay that people build with Starlette and broadcaster, after broadcaster's own example.

The path names the channel of Postgres, which is what broadcaster calls a channel too.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
from broadcaster import Broadcast
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

broadcast = Broadcast(os.environ["DATABASE_URL"])
subscribing = asyncio.Lock()  # broadcaster loses all but one of those that are first in a channel at the same time


async def listen(client: WebSocket) -> None:
    """Send everything that arrives in a channel, until the client leaves."""
    async with AsyncExitStack() as stack:
        async with subscribing:
            events = await stack.enter_async_context(broadcast.subscribe(client.path_params["channel"]))
        await client.accept()
        tasks = await stack.enter_async_context(anyio.create_task_group())

        async def end_with_it() -> None:
            async for _ in client.iter_text():
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(end_with_it)
        while True:
            await client.send_text((await events.get()).message)


@asynccontextmanager
async def connected(_app: Starlette) -> AsyncIterator[None]:
    """Connected to Postgres while the application runs."""
    async with broadcast:
        yield


app = Starlette(routes=[WebSocketRoute("/{channel}", listen)], lifespan=connected)
