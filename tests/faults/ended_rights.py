"""Rights that end while others write, and which writes must not be sent any more."""

import asyncio

from tests.faults.checker import Checker
from tests.faults.harness import Scenario
from tests.faults.oracle import Write

END = "delete from chatgenius.channel_members where (channel_id, user_id) = ($1, $2)"


class EndedRights:
    """The rights that have ended, and the writers' tag from which on each has ended."""

    def __init__(self, run: Scenario) -> None:
        self._run = run
        self._ended: dict[tuple[str, str], int] = {}

    async def end(self, checker: Checker, channel: str, *, notify: bool = True) -> None:
        """Remove a member. Writes that begin after this commit have a later tag than those that began before it."""
        right = (checker.user, f"channel:{channel}")
        connection = await self._run.oracle.connect()
        async with connection.transaction():
            if not notify:
                await connection.execute("set local rowcast.ring = off")
            await connection.execute(END, channel, checker.user)
        await connection.close()
        self._ended[right] = int(self._run.oracle.tag) + 1
        self._run.oracle.tag = str(self._ended[right])

    def forbidden(self, checker: Checker, write: Write) -> bool:
        """Did the write begin after the right had ended?"""
        ended = self._ended.get((checker.user, write.topic))
        return ended is not None and _number(write) >= ended

    def owed(self, checker: Checker, write: Write) -> bool:
        """Does the client still have its right? If not, a write in flight at its end may arrive or not."""
        return (checker.user, write.topic) not in self._ended


def _number(write: Write) -> int:
    return int(write.tag) if write.tag.isdigit() else 10**9  # a mark comes last


async def until_revoked(checker: Checker, topic: str) -> None:
    while topic not in checker.revoked and topic not in checker.refused:
        await asyncio.sleep(0.002)
