"""What goes wrong between nodes."""

from daemon.core.errors import RowcastError


class RelayUnavailable(RowcastError):
    """No member answers: {reason}."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class AnswerError(RowcastError):
    """A member has refused the question ({code}): {text}"""

    def __init__(self, code: str, text: str) -> None:
        self.code, self.text = code, text


class BadMessage(RowcastError):
    """A message between nodes cannot be read: {reason}."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class OtherVersion(BadMessage):
    """A message between nodes has another version ({version}): run the same version of Rowcast on all nodes."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it has version {version}")
        self.version = version
