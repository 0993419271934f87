"""Who may read what: one awaited answer per question, which the hub keeps true from then on."""

from collections.abc import Awaitable, Callable

from daemon.core.change import Seq, Topic
from daemon.core.hub import Follower, Hub
from daemon.core.ports import Grants


class Rights:
    """Answers for the followers of one hub.

    `wait_until_delivered` waits until the hub has delivered everything up to a position.
    """

    def __init__(self, hub: Hub, grants: Grants, wait_until_delivered: Callable[[Seq], Awaitable[None]]) -> None:
        self._hub = hub
        self._grants = grants
        self._wait_until_delivered = wait_until_delivered

    async def readable_from(self, topic: Topic, follower: Follower, is_wanted: Callable[[], bool]) -> Seq | None:
        """The position from which on the follower's user may read the topic.

        None if the user may not, or if the answer is not wanted any more when it arrives. Otherwise, when this
        returns, the hub has delivered everything before that position, and watches the right until the follower
        leaves the topic: `follower.revoked` is called when it ends. Raises GrantsUnavailable.
        """
        hub = self._hub
        while True:
            discontinuity = hub.discontinuity
            # Recorded from before the question on: a revocation behind the answer's position must not be missed.
            query = hub.begin_rights_query(topic, follower)
            try:
                start = await self._grants.readable_from(follower.user, topic)
                if start is not None:
                    await self._wait_until_delivered(start)  # what comes before it is not for this user
            finally:
                hub.end_rights_query(query)
            if hub.discontinuity is discontinuity:
                break  # else revocations may have been missed
        if start is None or query.revoked_at > start or not is_wanted():
            return None
        hub.watch_rights(topic, follower)
        return start
