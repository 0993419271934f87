import asyncio
import os
from functools import partial

from rowcast_client import Rowcast

say = partial(print, flush=True)


async def main() -> None:
    async with Rowcast(f"ws://{os.environ['SERVER']}/v1", token=os.environ["TOKEN"]) as rowcast:
        rowcast.on("status", partial(say, "status"))
        async for change in rowcast.changes("orders:ada"):
            say(change["kind"], change["key"]["id"] if "key" in change else change["reason"])


asyncio.run(main())
