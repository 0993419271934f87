"""Tables that are served without a pack: their row models, made from the catalog, and when these are made anew."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import Field, create_model

from daemon.core.own_tables import OwnTable
from daemon.core.ports import OwnTableReader
from daemon.delivery.pack_router import PackRouter
from daemon.logs import get_logger
from daemon.packs import BigInt, Column, Date, Numeric, Pack, Row, Timestamp, Uuid, contract_hash

log = get_logger()

_Float = Annotated[float, Field(allow_inf_nan=False)] | Literal["NaN", "Infinity", "-Infinity"]

_SHAPES: Final[dict[str, Any]] = {
    "boolean": bool,
    "smallint": int,
    "integer": int,
    "bigint": BigInt,
    "numeric": Numeric,
    "real": _Float,
    "double precision": _Float,
    "timestamp with time zone": Timestamp,
    "date": Date,
    "uuid": Uuid,
    "json": Annotated[Any, Column.JSON],
    "jsonb": Annotated[Any, Column.JSON],
}
"""What values look like that are more than a text; docs/types.md has them all."""

_ARRAYS: Final[dict[str, Any]] = {
    "bigint[]": Annotated[list[Any], Column.BIGINT],
    "numeric[]": Annotated[list[Any], Column.NUMERIC],
    "json[]": Annotated[list[Any], Column.JSON],
    "jsonb[]": Annotated[list[Any], Column.JSON],
}
"""Arrays may have any number of dimensions, whatever their columns say."""


def row_model(table: OwnTable) -> type[Row]:
    """The row model of a table: exactly its published columns, each as wide as its type."""
    fields: dict[str, Any] = {}
    for number, column in enumerate(table.columns):
        type_ = (
            _SHAPES.get(column.shape)
            or _ARRAYS.get(column.shape)
            or (list[Any] if column.shape.endswith("[]") else str)
        )
        # Not every name of a column can be one of an attribute.
        fields[f"column_{number}"] = (type_ | None if column.nullable else type_, Field(alias=column.name))
    model: type[Row] = create_model(table.table, __base__=Row, **fields)
    model.key = table.key
    return model


def pack_of(table: OwnTable) -> Pack:
    """A table as a pack of its own: a truncation or a right without a topic concerns its topics only."""
    patterns = [
        f"(?s:{re.escape(topic[:-1])}.*)" if topic.endswith("*") else re.escape(topic) for topic in table.topics
    ]
    return Pack(table.pack, {table.table: row_model(table)}, tuple(patterns))


def overlapping(pack: Pack, topics: Iterable[str]) -> str | None:
    """How topics of the pack begin that may also be among `topics`; None if there are none."""
    for pattern in pack.topics:
        begin = re.sub(r"[^\w:].*", "", pattern)  # the text before the first part that varies
        for topic in topics:
            prefix = topic.removesuffix("*")
            if re.fullmatch(pattern, prefix):
                return begin
            if prefix != topic and (begin.startswith(prefix) or (begin != pattern and prefix.startswith(begin))):
                return begin
    return None


class OwnTables:
    """Keeps a router up to date about the tables that are served without a pack.

    `contract` is the hash of all row models that the router has. A pack of a table is made anew only if it differs.
    """

    def __init__(self, reader: OwnTableReader, router: PackRouter) -> None:
        self._reader = reader
        self._router = router
        self._packs: dict[OwnTable, Pack] = {}
        self.contract = contract_hash(router.all_packs)

    async def refresh(self) -> None:
        """Look at what is served, and tell the router. Raises LogUnavailable."""
        self._packs = {table: self._packs.get(table) or pack_of(table) for table in await self._reader.read()}
        router, before = self._router, self._router.own
        router.own = {(table.schema, table.table): pack for table, pack in self._packs.items()}
        changed = {place: pack for place, pack in before.items() if router.own.get(place) is not pack}
        router.former = {**router.former, **changed}
        if changed or before.keys() != router.own.keys():
            self.contract = contract_hash(router.all_packs)
            log.info("tables_served", tables=sorted(f"{schema}.{table}" for schema, table in router.own))
