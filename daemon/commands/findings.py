"""What `daemon doctor` found about one thing: a line that says how it stands, and what to do."""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from daemon.core.errors import OperatorFault


class State(StrEnum):
    """How one thing stands."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """One line: what was looked at, how it stands, what was found, and what to do unless it is right."""

    check: str
    state: State
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.state:4}  {self.check:11}  {self.text}{remedy}"


def failed(check: str, fault: OperatorFault) -> Iterator[Finding]:
    """A finding for each line of a fault, whose message says what to do."""
    for line in str(fault).splitlines():
        yield Finding(check, State.FAIL, line)


def level(value: float, limits: tuple[float, float]) -> State:
    """How a value stands from which there is a warning, and a failure."""
    warning, failure = limits
    return State.FAIL if value >= failure else State.WARN if value >= warning else State.OK
