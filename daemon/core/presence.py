"""Who is present in a topic."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, NamedTuple

MAX_DATA: Final = 1024  # bytes of what a client says of itself


class Room(NamedTuple):
    """How many devices can be present in a topic: each is told of each other, and a user leaves room for others."""

    devices: int = 1000
    devices_of_user: int = 32


class Key(NamedTuple):
    """A device of a user."""

    user: str
    device: str


class Person(NamedTuple):
    """Somebody who is present. `data` is what they say of themselves: a JSON object, set at `updated_at`."""

    data: str
    since: datetime
    updated_at: datetime
    leaves: bool = False  # is disconnected, and has gone unless they come back soon


People = Mapping[Key, Person]


class Difference(NamedTuple):
    """What has changed between two moments."""

    joined: dict[Key, Person]
    left: list[Key]
    updated: dict[Key, Person]


def merged(parts: Iterable[People]) -> dict[Key, Person]:
    """Everybody once. A device that two processes know has its latest data, and came at the earlier time."""
    people: dict[Key, Person] = {}
    for part in parts:
        for key, person in part.items():
            known = people.get(key)
            if known is None:
                people[key] = person
            else:
                latest = max(known, person, key=lambda one: one.updated_at)
                people[key] = latest._replace(since=min(known.since, person.since))
    return people


def difference(before: People, after: People) -> Difference:
    """What followers who know `before` have to be told."""
    return Difference(
        joined={key: person for key, person in after.items() if key not in before},
        left=[key for key in before if key not in after],
        updated={key: person for key, person in after.items() if key in before and before[key].data != person.data},
    )
