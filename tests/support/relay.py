"""A member that is asked without a network, for tests."""

from collections.abc import Awaitable, Callable
from dataclasses import fields

from daemon.core.change import Position, Seq
from daemon.relay.port_questions import Ask
from daemon.relay.service import MemberPorts, Service


class Absent:
    """A port that nobody may use."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        async def used(*_: object) -> object:
            raise AssertionError(name)

        return used


HERE = Position("e", Seq(7))


def here() -> Position:
    """Where everybody is."""
    return HERE


def epoch() -> str:
    """The epoch of HERE."""
    return HERE.epoch


async def at_once(seq: Seq) -> None:
    """The member has delivered everything."""


def asking(**ports: object) -> Ask:
    """Asks a member that has these ports, and has delivered everything in the epoch of HERE."""
    every: dict[str, object] = {field.name: Absent() for field in fields(MemberPorts)}
    every |= {"position": lambda: HERE, "wait_until_delivered": at_once}
    return Service(MemberPorts(**every | ports)).answer  # type: ignore[arg-type]
