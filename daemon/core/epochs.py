"""Which epoch a gateway follows, as the beats of members show it."""

from typing import Final, NamedTuple

from daemon.core.batch import FRESH, Beat

MAX_FAILOVER: Final = 5.0  # seconds for which members of one database may be in different epochs
MAX_AGE: Final = 5.0  # seconds since a member read the log after which its epoch may have ended
LISTEN: Final = 0.6  # seconds in which every member that is there has sent a beat


class _Arrived(NamedTuple):
    epoch: str
    at: float
    age: float


class Epochs:
    """Keeps a gateway in one epoch while a member is there that shares it.

    Members may be in different epochs for two reasons. After a failover, some are earlier than others; then the old
    epoch soon has no member that reads its log. Or they are members of two databases with the same prefix, which
    nothing tells apart but that it lasts. So an epoch is left only when nobody is in it, or those who are have not
    read the log for MAX_AGE seconds; and neither left nor begun before LISTEN seconds have shown who else is
    there. With a choice between several, none is made.
    """

    def __init__(self) -> None:
        self.followed = ""  # empty before the first time
        self.is_mixed = False  # whether members have turned out to be of different databases
        self._latest: dict[str, _Arrived] = {}  # by member
        self._mixed_since: float | None = None
        self._others_since: float | None = None  # since when only others have sent beats

    def record(self, beat: Beat, now: float) -> None:
        """A beat has arrived; `now` is in seconds of any steady clock."""
        if beat.epoch:  # its member knows the log
            self._latest[beat.member] = _Arrived(beat.epoch, now, beat.age)
        self.decide(now)

    @property
    def cannot_begin(self) -> bool:
        """Whether there is a choice between several epochs, and none has been followed yet."""
        return not self.followed and self._mixed_since is not None

    def follows(self, epoch: str) -> bool:
        """Whether what comes of this epoch is for this gateway."""
        return epoch == self.followed

    def has(self, member: str) -> bool:
        """Whether this member may be asked."""
        beat = self._latest.get(member)
        return beat is not None and self.follows(beat.epoch)

    def decide(self, now: float) -> None:
        """Look at who is there."""
        self._latest = {member: beat for member, beat in self._latest.items() if now - beat.at < FRESH}
        there = {beat.epoch for beat in self._latest.values()}
        reading = {beat.epoch for beat in self._latest.values() if beat.age + now - beat.at < MAX_AGE}
        self._compare(there, reading, now)
        choices = there if self.is_mixed else reading or there
        if self.followed in choices or not choices:
            self._others_since = None
        elif self._others_since is None:
            self._others_since = now
        elif now - self._others_since >= LISTEN and len(choices) == 1:
            [self.followed] = choices
            self._others_since = None

    def _compare(self, there: set[str], reading: set[str], now: float) -> None:
        if len(there) <= 1 or (len(reading) <= 1 and not self.is_mixed):
            self._mixed_since, self.is_mixed = None, False
        elif self._mixed_since is None:
            self._mixed_since = now
        else:
            self.is_mixed |= now - self._mixed_since > MAX_FAILOVER
