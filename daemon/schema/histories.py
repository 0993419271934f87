"""What the files and a database say about revisions: which there are, and which are applied."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from daemon import files
from daemon.postgres.connect import PINNED, Connection
from daemon.schema import sql_files
from daemon.schema.queries import query, query_for
from daemon.schema.revisions import VERSION_TABLE, RevisionHistory, UnknownHistory, packs_in
from daemon.schema.sql_files import SqlFile

ROWCAST: Final = "rowcast"
"""Rowcast's own history and schema, which every pack requires."""

SESSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        **PINNED,  # a name that a file forgot to qualify is not found, least of all in `public`
        "statement_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
    }
)
"""Session settings that make a file mean the same in every database, whatever is set for its owner or role."""


def bundled(ddl_folder: Path | None = None) -> tuple[str, ...]:
    """The names of the bundled packs."""
    return tuple(pack for pack in packs_in(_ddl(ddl_folder)) if pack != ROWCAST)


def heads(
    packs: Collection[str], *, schemas: Mapping[str, str] = MappingProxyType({}), ddl_folder: Path | None = None
) -> dict[str, str]:
    """The newest revision in the files for each schema, Rowcast's own first.

    Raises UnknownPack, InvalidRevisions, BadSchemaName.
    """
    return {history.schema: history.newest for history in histories_of(packs, schemas, ddl_folder)}


async def current(connection: Connection, schema: str) -> str | None:
    """The revision that a schema is at; None if it has no history. Raises UnknownHistory."""
    sql_files.check_schema_name(schema, own=True)
    if await connection.fetchval("select pg_catalog.to_regclass($1)", f"{schema}.{VERSION_TABLE}") is None:
        return None
    rows = await connection.fetch(query_for("current", schema))
    if len(rows) > 1:
        raise UnknownHistory(schema, ", ".join(row["version_num"] for row in rows))
    return rows[0]["version_num"] if rows else None


async def revisions(connection: Connection) -> dict[str, str]:
    """The revision of each schema in this database that has a history of Rowcast or of a pack."""
    found: dict[str, str] = {}
    for name in [ROWCAST, *(row["schema_name"] for row in await connection.fetch(query("histories")))]:
        with suppress(sql_files.BadSchemaName, UnknownHistory):
            if revision := await current(connection, name):
                found[name] = revision
    return found


def check_known(found: Mapping[str, str], *, ddl_folder: Path | None = None) -> None:
    """Raises NewerDatabase if one of these revisions, by schema, is newer than the files of its pack."""
    ddl = _ddl(ddl_folder)
    for schema, revision in found.items():
        pack = revision.rpartition("_")[0]
        if pack in packs_in(ddl):
            RevisionHistory.read(pack, schema, ddl).place(revision)


async def stale(
    connection: Connection,
    packs: Collection[str],
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
) -> str | None:
    """Why a daemon with these files cannot serve the schemas in the database; None if it can.

    It can if they are at its newest revisions, or at later ones that say they are compatible with it. Raises the
    driver's errors.
    """
    for history in histories_of(packs, schemas, ddl_folder):
        revision = await current(connection, history.schema)
        if revision != history.newest and not await _is_compatible(connection, history, revision):
            return f"schema {history.schema} is at {revision or 'nothing'}, not at {history.newest}"
    return None


async def newer(
    connection: Connection,
    packs: Collection[str],
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
) -> dict[str, str]:
    """The schemas that are at a revision that the files do not know, with that revision."""
    found = {}
    for history in histories_of(packs, schemas, ddl_folder):
        revision = await current(connection, history.schema)
        if revision is not None and history.is_newer(revision):
            found[history.schema] = revision
    return found


async def _is_compatible(connection: Connection, history: RevisionHistory, revision: str | None) -> bool:
    """Whether every revision after the newest in the files says that daemons with these files can work with it."""
    if revision is None or not history.is_newer(revision):
        return False
    if await connection.fetchval("select pg_catalog.to_regclass('rowcast.compatibility')") is None:
        return False
    rows = await connection.fetch(query("compatibility"), history.schema)
    return history.allows({row["revision"]: row["compatible_with"] for row in rows}, revision)


def reset_session(settings: Mapping[str, str], role: str | None = None) -> str:
    """The statements that run before each file, so that no file sees the settings of the one before it.

    The files run as `role`, if there is one.
    """
    values = {name: ", ".join(f"'{part.strip()}'" for part in value.split(",")) for name, value in settings.items()}
    taken = ["set role = '{}';".format(role.replace("'", "''"))] if role else []
    lines = [
        "reset session authorization; reset all;",
        *taken,
        *(f"set {name} = {value};" for name, value in values.items()),
    ]
    return "".join(f"{line}\n" for line in lines)


def _ddl(folder: Path | None) -> Path:
    return folder or files.folder("ddl")


def triggers_of(history: RevisionHistory, folder: Path | None, suffix: str = ".sql") -> SqlFile | None:
    """The pack's file in triggers/, if there is one. Raises BadSqlFile."""
    path = (folder or files.folder("triggers")) / f"{history.pack}{suffix}"
    return sql_files.read(path, pack=history.pack, schema=history.schema) if path.exists() else None


def histories_of(
    packs: Collection[str], schemas: Mapping[str, str], ddl_folder: Path | None
) -> Sequence[RevisionHistory]:
    """Rowcast's own history and those of the packs, in the order of applying."""
    histories = [history_of(pack, schemas.get(pack), ddl_folder) for pack in dict.fromkeys((ROWCAST, *packs))]
    owners: dict[str, str] = {}
    for history in histories:
        if (owner := owners.setdefault(history.schema, history.pack)) != history.pack:
            raise sql_files.BadSchemaName(history.schema, f"{owner} and {history.pack} cannot share it")
    return histories


def history_of(pack: str, schema: str | None, ddl_folder: Path | None) -> RevisionHistory:
    """The revisions of a pack, for `schema` or the one of its name.

    Raises UnknownPack, InvalidRevisions, BadSchemaName.
    """
    schema = pack if pack == ROWCAST or schema is None else schema
    sql_files.check_schema_name(schema, own=pack == ROWCAST)
    return RevisionHistory.read(pack, schema, _ddl(ddl_folder))
