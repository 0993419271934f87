"""Compares schemas in a live database with what the files build.

Both are described by catalog.sql. What is missing or changed is a problem, with the statement that mends it. What
an application added is its own business, unless it changes what the files promise: a constraint, a unique index, a
rule or a required column refuses or rewrites what the files accept, and privileges of `public`, or of a role to which
the files grant some, open what the files close.
"""

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Final

import asyncpg

from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema.capture_check import Problem
from daemon.schema.histories import ROWCAST, histories_of, history_of
from daemon.schema.one_line import one_line
from daemon.schema.revisions import VERSION_TABLE, RevisionHistory
from daemon.schema.scratch import Scratch, built, catalog
from daemon.schema.trial import try_captures

_SHOWN: Final = 200  # characters of a value that a message may contain
_APPLY: Final = "run `daemon --apply-ddl`"
_UNWATCH: Final = f"{_APPLY}, or call rowcast.unwatch() if no pack watches it"
_CAPTURE_ROLE: Final = "rowcast_capture"
_PUBLIC: Final = "public"
NOT_COMPARED: Final = Problem(
    "the schemas",
    "they were not compared: this role may not build them anew",
    "connect as the role that applies the schemas, or grant CREATE on the database to this one",
)


@dataclass(frozen=True, slots=True)
class Property:
    """A property of an object: its value, the statement that sets it, and the one that removes the object."""

    value: str
    mend: str | None
    undo: str | None
    part_of: str | None


@dataclass(frozen=True, slots=True)
class Grant:
    """The privileges of a role on an object, or on one column of it."""

    target: str  # as GRANT names it
    column: str | None
    grantee: str
    privileges: frozenset[str]

    def statement(self, verb: str, privileges: Collection[str]) -> str:
        """The statement that grants or revokes some privileges."""
        column = f" ({self.column})" if self.column else ""
        listed = ", ".join(f"{privilege}{column}" for privilege in sorted(privileges))
        return f"{verb} {listed} on {self.target} {'to' if verb == 'grant' else 'from'} {self.grantee}"


@dataclass(frozen=True, slots=True)
class Description:
    """What a schema contains: objects with their properties, privileges by object and role, and watched tables."""

    schema: str
    objects: dict[str, dict[str, Property]]
    grants: dict[tuple[str, str], Grant]
    watches: dict[str, dict[str, str]] = field(default_factory=dict)
    extensions: frozenset[str] = frozenset()  # those that the pack wants, or those that a live database has


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles that exist, and those that get privileges on whatever this session creates."""

    known: frozenset[str]
    by_default: frozenset[str]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as in the files. `property` is empty if it is about the object as a whole."""

    object: str
    property: str
    problem: str
    remedy: str


async def check_schemas(
    connection: Connection,
    packs: Collection[str],
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    known: Collection[str] = (),
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
) -> list[Problem]:
    """How Rowcast's schema, those of the packs and the captured tables differ from what the files make today.

    The schemas must be at the newest revisions, and the session must have the settings of `migrate.SESSION`. The
    tables in `known` have problems already, so their captures are left out. `trigger_settings` are those with which
    the files were applied. Raises an OperatorFault.
    """
    histories = histories_of(packs, schemas, ddl_folder)
    found: list[Problem] = []
    try:
        if not await connection.fetchval(catalog("may_create_schema")):
            return [NOT_COMPARED]
        live = {history.schema: await describe_live(connection, history.schema) for history in histories}
        roles = await read_roles(connection)
        async with built(connection, histories, triggers_folder, trigger_settings) as scratch:
            for history in histories:
                found += _problems(await compare(scratch, history, live[history.schema], roles))
            if trigger_settings.get("rowcast.notifications") == "off":
                found += [
                    Problem(f"table {name}", "it is captured, but ROWCAST_NOTIFICATIONS is off", _UNWATCH)
                    for description in live.values()
                    for name in description.watches
                ]
            found += await try_captures(scratch, known)
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    return found


async def check_revision(
    connection: Connection,
    history: RevisionHistory,
    *,
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
) -> list[Problem]:
    """How a schema differs from what these revisions make, when the pack's file in triggers/ does not count.

    The schema must be at the last of them. Raises an OperatorFault.
    """
    try:
        if not await connection.fetchval(catalog("may_create_schema")):
            return [NOT_COMPARED]
        live = await describe_live(connection, history.schema)
        roles = await read_roles(connection)
        async with _built_alone(connection, history, ddl_folder, triggers_folder) as scratch:
            return list(_problems(await compare(scratch, history, live, roles)))
    except DRIVER_ERRORS as error:
        raise explain(error) from None


async def check_removed(
    connection: Connection,
    history: RevisionHistory,
    *,
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
) -> list[Problem]:
    """What these revisions made and is still in the schema, after all of them were rolled back.

    Raises an OperatorFault.
    """
    try:
        if await connection.fetchval("select pg_catalog.to_regnamespace($1) is null", history.schema):
            return []
        if not await connection.fetchval(catalog("may_create_schema")):
            return [NOT_COMPARED]
        live = await _describe(connection, history.schema, "", ROWCAST, str)
        async with _built_alone(connection, history, ddl_folder, triggers_folder) as scratch:
            files = await describe_files(scratch, history.schema, "")
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    left = [name for name in files.objects if name in live.objects]
    return [Problem(name, "it is still there", "its down file should drop it") for name in left]


@asynccontextmanager
async def _built_alone(
    connection: Connection, history: RevisionHistory, ddl_folder: Path | None, triggers_folder: Path | None
) -> AsyncIterator[Scratch]:
    """What these revisions make, and Rowcast's own schema, which they need."""
    own = history if history.pack == ROWCAST else history_of(ROWCAST, None, ddl_folder)
    histories = list({each.schema: each for each in (own, history)}.values())
    async with built(connection, histories, triggers_folder, without_triggers=history.schema) as scratch:
        yield scratch


async def describe_files(scratch: Scratch, schema: str, owner: str) -> Description:
    """What the files build for a live schema, in which `owner` owns what Rowcast made."""
    return await _describe(
        scratch.connection, scratch.names[schema], owner, scratch.names[ROWCAST], scratch.in_live_names
    )


async def read_again(scratch: Scratch, schema: str, owner: str, objects: Collection[str]) -> None:
    """Make definitions anew from what the server prints for them.

    That is what restoring a dump does, and the server may print the result in another way.
    """
    described = await _describe(scratch.connection, scratch.names[schema], owner, scratch.names[ROWCAST], str)
    for name, found in described.objects.items():
        for key in ("definition", "default"):
            if scratch.in_live_names(name) in objects and (value := found.get(key)) and value.mend:
                with suppress(asyncpg.PostgresError):  # such as of a key that others refer to
                    async with scratch.connection.transaction():
                        await scratch.connection.execute(value.mend)


async def describe_live(connection: Connection, schema: str) -> Description:
    """What a live schema contains. The watched tables and extensions are those of the whole database's Rowcast."""
    description = await _describe(connection, schema, await _owner(connection, schema), ROWCAST, str)
    extensions = await connection.fetch(catalog("extensions"))
    return replace(description, extensions=frozenset(row["name"] for row in extensions))


async def _describe(
    connection: Connection, schema: str, owner: str, rowcast: str, restore: Callable[[str], str]
) -> Description:
    objects: dict[str, dict[str, Property]] = {}
    for row in await connection.fetch(catalog("describe"), schema, owner):
        mend, undo, part_of = (restore(row[name]) if row[name] else None for name in ("mend", "undo", "part_of"))
        properties = objects.setdefault(restore(row["object"]), {})
        properties[row["property"]] = Property(restore(row["value"]), mend, undo, part_of)
    grants = {}
    for row in await connection.fetch(catalog("grants"), schema):
        grant = Grant(restore(row["target"]), row["column_name"], row["grantee"], frozenset(row["privileges"]))
        grants[restore(row["object"]), row["grantee"]] = grant
    description = Description(restore(schema), objects, grants)
    if await connection.fetchval("select pg_catalog.to_regclass($1) is null", f"{rowcast}.watched"):
        return description
    for row in await connection.fetch(catalog("watches").replace("the_rowcast", rowcast), schema):
        description.watches[restore(row["name"])] = {
            key: restore(value) for key, value in row.items() if key != "name"
        }
    wanted = await connection.fetch(catalog("wanted_extensions").replace("the_rowcast", rowcast), schema)
    return replace(description, extensions=frozenset(row["name"] for row in wanted))


async def _owner(connection: Connection, schema: str) -> str:
    owner: str = await connection.fetchval(catalog("history_owner"), f"{schema}.{VERSION_TABLE}")
    return owner


async def read_roles(connection: Connection) -> Roles:
    """The roles of the cluster."""
    rows = await connection.fetch(catalog("roles"))
    by_default = frozenset(row["name"] for row in rows if row["by_default"])
    return Roles(frozenset(row["name"] for row in rows), by_default)


async def compare(scratch: Scratch, history: RevisionHistory, live: Description, roles: Roles) -> list[Difference]:
    """The differences of a live schema from the files, in the order in which they can be mended."""
    schema, exact = history.schema, history.pack == ROWCAST
    owner = await _owner(scratch.connection, schema)
    found = list(differences(live, await describe_files(scratch, schema, owner), roles, exact=exact))
    if changed := {one.object for one in found if one.property}:
        await read_again(scratch, schema, owner, changed)
        again = differences(live, await describe_files(scratch, schema, owner), roles, exact=exact)
        found = in_both(found, again)
    return found


def in_both(found: Iterable[Difference], again: Iterable[Difference]) -> list[Difference]:
    """The differences that are also there when definitions were read again."""
    still = {(one.object, one.property) for one in again}
    return [one for one in found if (one.object, one.property) in still]


def differences(live: Description, files: Description, roles: Roles, *, exact: bool) -> Iterator[Difference]:
    """What is missing or changed in a live schema, and those additions that matter. In Rowcast's own, all do."""
    for name in sorted(files.extensions - live.extensions):
        remedy = f"select {ROWCAST}.want_extension('{files.schema}', '{name}')"
        yield Difference(f"extension {name}", "", "it is missing", remedy)
    yield from _missing_or_changed(live, files)
    yield from _added(live, files)
    yield from _unwatched(live, files)
    yield from _privileges(live, files, roles, exact=exact)


def _missing_or_changed(live: Description, files: Description) -> Iterator[Difference]:
    for name, properties in files.objects.items():
        found = live.objects.get(name, {})
        for key, wanted in properties.items():
            if key == "" and not found and _stands(live, wanted):
                renamed = ", or has another name" if name.startswith("column ") else ""
                yield Difference(name, "", f"it is missing{renamed}", wanted.mend or _APPLY)
            elif found and key not in found:
                yield Difference(name, key, f"it has no {key}", wanted.mend or _APPLY)
            elif found and not _equal(key, found[key].value, wanted.value):
                yield Difference(
                    name, key, _changed(key, found[key].value, wanted.value), _mend(key, found[key], wanted)
                )


def _stands(live: Description, part: Property) -> bool:
    """Whether what the object is a part of exists: otherwise that is the problem."""
    return part.part_of is None or part.part_of in live.objects


def _equal(key: str, found: str, wanted: str) -> bool:
    if key == "replica identity" and wanted == "default":
        return True  # a replication's own business
    return found == wanted


def _changed(key: str, found: str, wanted: str) -> str:
    if max(len(found), len(wanted)) > _SHOWN or "\n" in found + wanted:
        return f"its {key} is not that of the files"
    return f"its {key} is {found}, not {wanted}"


def _mend(key: str, found: Property, wanted: Property) -> str:
    if key == "labels" and not _is_part(json.loads(found.value), json.loads(wanted.value)):
        return "no statement removes or moves a label: rename it, or make the type anew"
    return wanted.mend or "no statement changes it: make the object anew"


def _is_part(some: list[str], every: list[str]) -> bool:
    """Whether a list is another one with some items left out."""
    rest = iter(every)
    return all(one in rest for one in some)


def _added(live: Description, files: Description) -> Iterator[Difference]:
    for name, properties in live.objects.items():
        whole = properties.get("")
        if whole and whole.undo and name not in files.objects and whole.part_of in files.objects:
            yield Difference(name, "", "no file makes it, and it changes which rows are accepted", whole.undo)


def _unwatched(live: Description, files: Description) -> Iterator[Difference]:
    for name, wanted in files.watches.items():
        found = live.watches.get(name)
        if f"table {name}" not in live.objects:
            continue
        if found is None:
            yield Difference(f"table {name}", "", "it is not watched", _APPLY)
        elif found != wanted:
            keys = " and ".join(key for key in wanted if found[key] != wanted[key])
            yield Difference(f"table {name}", "", f"it is watched with other {keys} than in the files", _APPLY)


def _privileges(live: Description, files: Description, roles: Roles, *, exact: bool) -> Iterator[Difference]:
    ours = {grantee for _, grantee in files.grants} - roles.by_default - {_PUBLIC}
    for role in sorted(ours - roles.known):
        yield Difference(f"role {role}", "", "it does not exist", f"create role {role}; then {_APPLY}")
    for (name, grantee), wanted in files.grants.items():
        lacks = wanted.privileges - _held(live, name, grantee)
        if lacks and _described(live, name) and grantee in roles.known | {_PUBLIC}:
            problem = f"{grantee} lacks {', '.join(sorted(lacks))}"
            yield Difference(name, "", problem, wanted.statement("grant", lacks))
    # An operator's own captures may need more: their topics are looked up by this role too.
    closed = ours | {_PUBLIC} if exact else (ours | {_PUBLIC}) - {_CAPTURE_ROLE}
    for (name, grantee), held in live.grants.items():
        more = held.privileges - _held(files, name, grantee)
        if more and grantee in closed and _described(files, name):
            problem = f"{grantee} has {', '.join(sorted(more))}, which no file grants"
            yield Difference(name, "", problem, held.statement("revoke", more))


def _held(description: Description, name: str, grantee: str) -> frozenset[str]:
    grant = description.grants.get((name, grantee))
    return grant.privileges if grant else frozenset()


def _described(description: Description, name: str) -> bool:
    return name in description.objects or name.startswith("schema ")


def _problems(found: Iterable[Difference]) -> Iterator[Problem]:
    """One problem for all properties of an object that one statement mends."""
    for (name, remedy), group in groupby(found, key=lambda one: (one.object, one.remedy)):
        yield Problem(name, ", ".join(one.problem for one in group), one_line(remedy))
