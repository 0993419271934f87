"""A follower of the hub for tests of what comes before it."""

from daemon.core.change import Numbers, Topic


class Follower:
    """A follower that keeps the frames that it receives."""

    user = "ada"
    numbers = Numbers.JSON
    outlet = None

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def deliver(self, frames: bytes) -> None:
        self.frames.append(frames)

    def revoked(self, topic: Topic) -> None:
        raise AssertionError(topic)

    def discontinued(self) -> None:
        raise AssertionError

    def signal(self, frame: bytes) -> None:
        raise AssertionError(frame)
