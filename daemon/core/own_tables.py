"""Tables that are served without a pack: what the database says about them."""

from typing import NamedTuple


class OwnColumn(NamedTuple):
    """A published column. `shape` is the type of Postgres that its values look like in frames."""

    name: str
    shape: str
    nullable: bool


class OwnTable(NamedTuple):
    """A table that is served, as a pack of its own. Of topics there is each, or how they begin and an asterisk."""

    schema: str
    table: str
    pack: str
    topics: tuple[str, ...]
    key: tuple[str, ...]
    columns: tuple[OwnColumn, ...]
