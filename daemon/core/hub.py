"""Fan-out: which follower gets which frames. A frame is built once, and shared by all who follow its stream."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar

from daemon.core import wire
from daemon.core.change import RESET_KINDS, Change, Numbers, Position, Right, Seq, Topic
from daemon.core.filters import Cells, View
from daemon.core.ports import Encode, Outlet


class RightEnd(NamedTuple):
    """A right ended at `seq`. It applied to topics for which `serves` is true."""

    seq: Seq
    right: Right
    serves: Callable[[Topic], bool]


class Discontinuity(NamedTuple):
    """A break in the stream: the hub continued at `position`, which does not follow what it had delivered.

    `number` counts them, so that two are never equal. What lies in between is unknown, revocations included.
    """

    number: int
    reason: str  # of the `reset` that clients get
    position: Position


class Follower(Protocol):
    """A client as the hub sees it. No method waits or raises."""

    @property
    def user(self) -> str:
        """The user whose rights count."""

    @property
    def numbers(self) -> Numbers:
        """The form of its frames. It does not change while topics are followed."""

    @property
    def outlet(self) -> Outlet | None:
        """Where frames may bypass `deliver`."""

    def deliver(self, frames: bytes) -> None:
        """Take everything that concerns this follower up to the hub's `position`: encoded frames, in order.

        A follower that has enough may leave its topics from inside this call.
        """

    def signal(self, frame: bytes) -> None:
        """Take a signal, unless there is too much to read already."""

    def revoked(self, topic: Topic) -> None:
        """The right to this topic has ended; the hub has already removed this follower from it."""

    def discontinued(self) -> None:
        """The hub moved to a new discontinuity: suspend every live topic and replay it."""


class Interest(Protocol):
    """Who has to know which topics have live followers."""

    def follow(self, topic: Topic) -> None:
        """The topic has its first follower, who gets what lies past the hub's position."""

    def unfollow(self, topic: Topic) -> None:
        """The topic has no follower any more."""


class RightsQuery:
    """A right that is being looked up, so that a revocation meanwhile is not missed."""

    __slots__ = ("follower", "revoked_at", "topic")

    def __init__(self, topic: Topic, follower: Follower) -> None:
        self.topic = topic
        self.follower = follower
        self.revoked_at = Seq(0)  # where the right last ended since the query began; 0 if it did not


class _Stream(NamedTuple):
    """The frames of a topic in one form, with what a view shows of it. Those who follow it get the same ones."""

    topic: Topic
    numbers: Numbers
    view: View | None = None


_SentFrame = tuple[_Stream, Position, Sequence[Change], bytes]
"""A stream, its position before the frame, the run of changes that the frame is built from, and the frame.

A plain tuple: where each change has a frame of its own, to make one with names would take as long as to encode it.
"""


_Key = TypeVar("_Key")
_Member = TypeVar("_Member")

FanOut = Callable[[Iterable[Follower], bytes], None]
"""Delivers the same frames to each of these followers."""


def deliver_to_each(followers: Iterable[Follower], frames: bytes) -> None:
    """The FanOut that knows nothing of outlets."""
    for follower in followers:
        follower.deliver(frames)


_Share = tuple[Collection[Follower], list[bytes]]
"""The same frames for each of these followers."""


class Hub:
    """The live end of the log in this process: how far it has come, and who follows what.

    `position` is what has been delivered to every follower; only `publish` and `move` change it. `discontinuity` is
    the last one: replays that began before it restart from its position. `with_exact_numbers` gives a change as
    clients with Numbers.STRING get it; such frames are built only for topics that one of them follows. `interest`, if
    there is one, learns which topics are followed. `has_tx`: whether changes name their transactions, here and in
    replays.
    """

    def __init__(
        self,
        encode: Encode,
        with_exact_numbers: Callable[[Change], Change],
        fan_out: FanOut = deliver_to_each,
        *,
        has_tx: bool = True,
    ) -> None:
        self.position = Position("", Seq(0))
        self.interest: Interest | None = None
        self.has_tx = has_tx
        self.discontinuity = Discontinuity(0, "", self.position)
        self._encode = encode
        self._with_exact_numbers = with_exact_numbers
        self._fan_out = fan_out
        self._followers: dict[_Stream, dict[Follower, None]] = {}
        self._pending: dict[Topic, dict[Follower, None]] = {}  # not live yet, but their rights are watched
        self._queries: dict[Topic, dict[RightsQuery, None]] = {}
        # Of each followed topic the streams, each with the position of its last frame.
        self._streams: dict[Topic, dict[_Stream, Position]] = {}
        self._views: dict[tuple[Topic, Follower], View] = {}  # of those who do not see everything

    def begin_rights_query(self, topic: Topic, follower: Follower) -> RightsQuery:
        """The follower's right to the topic is being looked up: record whether it ends meanwhile."""
        query = RightsQuery(topic, follower)
        self._queries.setdefault(topic, {})[query] = None
        return query

    def end_rights_query(self, query: RightsQuery) -> None:
        """The right has been looked up: `query` says what happened meanwhile."""
        _discard(self._queries, query.topic, query)

    def watch_rights(self, topic: Topic, follower: Follower) -> None:
        """Tell this follower if its right to the topic ends, until it follows or leaves the topic."""
        self._pending.setdefault(topic, {})[follower] = None

    def follow(self, topic: Topic, follower: Follower, view: View | None = None) -> None:
        """Deliver the topic's changes past `position` to this follower, as far as `view` shows them."""
        _discard(self._pending, topic, follower)
        stream = _Stream(topic, follower.numbers, view)
        if view is not None:
            self._views[topic, follower] = view
        if self.interest is not None and topic not in self._streams:
            self.interest.follow(topic)
        self._streams.setdefault(topic, {}).setdefault(stream, self.position)
        self._followers.setdefault(stream, {})[follower] = None

    def unfollow(self, topic: Topic, follower: Follower) -> None:
        """Deliver nothing more of the topic to this follower, and watch its right no longer."""
        _discard(self._pending, topic, follower)
        stream = _Stream(topic, follower.numbers, self._views.pop((topic, follower), None))
        _discard(self._followers, stream, follower)
        if stream not in self._followers and topic in self._streams:
            _discard(self._streams, topic, stream)
            if self.interest is not None and topic not in self._streams:
                self.interest.unfollow(topic)

    def suspend(self, topics: Iterable[Topic], follower: Follower) -> dict[Topic, Seq]:
        """Stop delivering these topics for now, but still tell this follower if a right to one of them ends.

        Returns the topics that were live, each with the position of its last frame.
        """
        suspended: dict[Topic, Seq] = {}
        for topic in topics:
            stream = _Stream(topic, follower.numbers, self._views.get((topic, follower)))
            if follower in self._followers.get(stream, ()):
                suspended[topic] = self._streams[topic][stream].seq
                self.unfollow(topic, follower)
                self.watch_rights(topic, follower)
        return suspended

    def followers(self, topic: Topic) -> list[Follower]:
        """The live followers of a topic."""
        return list(chain.from_iterable(self._followers[stream] for stream in self._streams.get(topic, ())))

    @property
    def topics(self) -> Collection[Topic]:
        """The topics that have live followers."""
        return self._streams.keys()

    def follower_counts(self) -> Counter[Topic]:
        """How many live followers each topic has."""
        counts: Counter[Topic] = Counter()
        for stream, followers in self._followers.items():
            counts[stream.topic] += len(followers)
        return counts

    def count_followers(self, topic: Topic) -> int:
        """How many live followers this topic has."""
        return sum(len(self._followers[stream]) for stream in self._streams.get(topic, ()))

    @property
    def subscriptions(self) -> int:
        """How many pairs of topic and live follower there are."""
        return sum(map(len, self._followers.values()))

    def publish(
        self,
        changes: Sequence[Change],
        position: Position,
        covers: Callable[[Change], Iterable[Topic]],
        ended_rights: Iterable[RightEnd] = (),
    ) -> tuple[int, int]:
        """Deliver changes, in order, and move to `position`. Returns how many frames were built and delivered.

        Each follower gets everything that concerns it in one call, and followers that get the same get the same
        object. `covers` names the followed topics that a change of one of RESET_KINDS concerns: they get `reset`. A
        follower that loses a right gets that topic's changes before the end of the right, and `revoked`.
        """
        revocations = self._revocations(ended_rights)
        sent, latest = self._build_frames(changes, position.epoch, covers)
        revoked_followers = {follower for _, follower in revocations}
        shares = self._shares(sent, revoked_followers)
        shares += [
            ([follower], self._truncated(sent, follower, revocations, position.epoch))
            for follower in revoked_followers
        ]
        for stream, last in latest.items():  # nothing was changed before, so a caller may try again after an error
            self._streams[stream.topic][stream] = last
        self.position = position
        for topic, follower in revocations:
            self.unfollow(topic, follower)
            follower.revoked(topic)
        delivered = 0
        for followers, frames in shares:
            delivered += len(followers) * len(frames)
            self._fan_out(followers, frames[0] if len(frames) == 1 else b"".join(frames))
        return len(sent), delivered

    def move(self, position: Position, reason: str) -> None:
        """Continue from a position that does not follow the last one, and tell every live follower."""
        self.position = position
        self.discontinuity = Discontinuity(self.discontinuity.number + 1, reason, position)
        for follower in {follower for followers in self._followers.values() for follower in followers}:
            follower.discontinued()

    def _build_frames(
        self, changes: Iterable[Change], epoch: str, covers: Callable[[Change], Iterable[Topic]]
    ) -> tuple[list[_SentFrame], dict[_Stream, Position]]:
        """The frames for the followed topics, in order, and the position of the last one of each stream."""
        sent: list[_SentFrame] = []
        latest: dict[_Stream, Position] = {}
        cells: dict[Seq, Cells] = {}
        streams = self._streams
        relevant = [change for change in changes if change.topic in streams or change.kind in RESET_KINDS]
        for topic, run in wire.runs(relevant):
            last_change = run[-1]
            upto = Position(epoch, last_change.seq)
            for concerned in covers(last_change) if last_change.kind in RESET_KINDS else (topic,):
                for stream, last in streams[concerned].items():
                    prev = latest.get(stream, last)
                    frame = self._frame(stream, prev, run, upto, cells)
                    if frame is not None:
                        sent.append((stream, prev, run, frame))
                        latest[stream] = upto
        return sent, latest

    def _shares(self, sent: Sequence[_SentFrame], revoked_followers: Collection[Follower]) -> list[_Share]:
        """What to deliver to whom, but for followers that lose a right: one share for all with the same streams."""
        frames: defaultdict[_Stream, list[tuple[int, bytes]]] = defaultdict(list)
        for place, (stream, _, _, frame) in enumerate(sent):
            frames[stream].append((place, frame))
        # Followers by their streams, as indexes into `frames`: these are looked up for each follower.
        groups: dict[tuple[int, ...], list[Follower]] = {}
        if len(frames) == 1:
            [stream] = frames
            groups[0,] = list(self._followers[stream])
        elif frames:
            streams_of: dict[Follower, tuple[int, ...]] = {}
            for index, stream in enumerate(frames):
                for follower in self._followers[stream]:
                    streams_of[follower] = (*streams_of.get(follower, ()), index)
            for follower, streams in streams_of.items():
                groups.setdefault(streams, []).append(follower)
        of_stream = list(frames.values())

        def in_order(streams: tuple[int, ...]) -> list[bytes]:
            if len(streams) == len(of_stream):
                return [frame for _, _, _, frame in sent]
            return [frame for _, frame in sorted(chain.from_iterable(of_stream[index] for index in streams))]

        return [
            (
                [follower for follower in followers if follower not in revoked_followers]
                if revoked_followers
                else followers,
                in_order(streams),
            )
            for streams, followers in groups.items()
        ]

    def _truncated(
        self,
        sent: Iterable[_SentFrame],
        follower: Follower,
        revocations: Mapping[tuple[Topic, Follower], Seq],
        epoch: str,
    ) -> list[bytes]:
        """The frames for a follower that loses a right: that topic's changes before its end, then `revoked`."""
        frames: list[bytes] = []
        for stream, prev, run, frame in sent:
            if follower in self._followers[stream]:
                revoked_at = revocations.get((stream.topic, follower))
                if revoked_at is None or run[-1].seq < revoked_at:
                    frames.append(frame)
                elif kept := [change for change in run if change.seq < revoked_at]:
                    truncated = self._frame(stream, prev, kept, Position(epoch, kept[-1].seq), {})
                    if truncated is not None:
                        frames.append(truncated)
        for (topic, loser), revoked_at in revocations.items():
            if loser is follower:
                frames.append(self._encode(wire.revoked(topic, Position(epoch, revoked_at))))
        return frames

    def _frame(
        self, stream: _Stream, prev: Position, run: Sequence[Change], upto: Position, cells: dict[Seq, Cells]
    ) -> bytes | None:
        """The frame of a stream for a run up to here: its changes, or a reset. None if its view shows nothing."""
        topic, numbers, view = stream
        if run[-1].kind in RESET_KINDS:
            return self._encode(wire.reset(topic, run[-1].kind.value, upto))
        if view is not None:
            run = view.of_run(run, cells)
            if not run:
                return None
        if numbers is Numbers.STRING:
            run = list(map(self._with_exact_numbers, run))
        return self._encode(wire.changes(topic, prev, run, upto.seq, has_tx=self.has_tx))

    def _revocations(self, ended_rights: Iterable[RightEnd]) -> dict[tuple[Topic, Follower], Seq]:
        """Which followers, live or pending, lose which topic, and where. Also records it in the running queries."""
        revocations: dict[tuple[Topic, Follower], Seq] = {}
        for seq, right, serves in ended_rights:
            known = (right.topic,) if right.topic is not None else {*self._streams, *self._pending, *self._queries}
            for topic in filter(serves, known):
                live = chain.from_iterable(self._followers[stream] for stream in self._streams.get(topic, ()))
                for follower in (*live, *self._pending.get(topic, ())):
                    if right.user is None or right.user == follower.user:
                        revocations.setdefault((topic, follower), seq)
                for query in self._queries.get(topic, ()):
                    if right.user is None or right.user == query.follower.user:
                        query.revoked_at = seq
        return revocations


def _discard(members: dict[_Key, dict[_Member, Any]], key: _Key, member: _Member) -> None:
    """Remove a member from a topic or stream, and that with its last member."""
    of_key = members.get(key, {})
    of_key.pop(member, None)
    if not of_key:
        members.pop(key, None)
