"""The fault of invalid settings."""

from typing import ClassVar

from daemon.core.errors import OperatorFault


class BadSettings(OperatorFault):
    """{problems}"""

    exit_code: ClassVar[int] = 78

    def __init__(self, *problems: str) -> None:
        self.problems = "\n".join(problems)
