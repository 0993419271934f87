"""Whether every watched table is still captured as rowcast.watch() set it up, and a pack's schema as it was made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemon import files
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import sql_files
from daemon.schema.queries import query

# Applying makes anew what watch() finds missing or switched off. What it does not look at has to go first.
_RENEW: Final = "run `daemon --apply-ddl`, or rowcast.watch() again if no pack watches it"
_AFRESH: Final = "in one transaction, rowcast.unwatch() it and rowcast.watch() it again"

_TRIGGER: Final = "its capture trigger on {place} for {operations} "
_PROBLEMS: Final = {
    "gone": (
        "the table is gone or has another name",
        "rename it back, or call rowcast.unwatch_dropped() if it was dropped",
    ),
    "function_missing": ("its capture function {place} is missing", _RENEW),
    "function_altered": ("its capture function {place} is not what rowcast.watch() made", _AFRESH),
    "function_owner": ("its capture function {place} does not belong to rowcast_capture", _AFRESH),
    "missing": (_TRIGGER + "is missing", _RENEW),
    "disabled": (_TRIGGER + "is disabled", _RENEW),
    "replica": (_TRIGGER + "fires in replica mode only", _RENEW),
    "not_always": (_TRIGGER + "is not enabled always, as row triggers are here", _RENEW),
    "always": (_TRIGGER + "is enabled always, so replication would fire it too", _RENEW),
    "trigger_altered": (_TRIGGER + "is not what rowcast.watch() made", _AFRESH),
    "stray": ("{place} is captured as this table", "drop its triggers {operations}, or give it its old place again"),
    "subscription": (
        "a subscription feeds {place}, and replication fires no statement triggers",
        "rowcast.watch() it again with per_row => true",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a watched table is not captured, or something in a pack's schema is not, as it should be."""

    table: str  # with its schema, quoted where SQL would need it; or another object, by whatever names it
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.table}: {self.problem}: {self.remedy}"


async def check_captures(connection: Connection) -> list[Problem]:
    """What has drifted, by table; empty if all is captured. Needs Rowcast's own schema. Raises a DatabaseFault."""
    try:
        rows = await connection.fetch(query("capture_problems"))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    found = []
    for row in rows:
        problem, remedy = _PROBLEMS[row["problem"]]
        if row["cloned"]:  # watch() looks at the parent's trigger, which may well stand
            remedy = _AFRESH
        words = {"place": row["place"], "operations": row["operations"]}
        found.append(Problem(row["name"], problem.format(**words), remedy.format(**words)))
    return found


async def check_rules(
    connection: Connection, pack: str, schema: str, *, ddl_folder: Path | None = None
) -> list[Problem]:
    """What ddl/<pack>/check.sql finds in the pack's schema; nothing for a pack that has no such file.

    The file is one query that writes nothing, with the columns place, problem and remedy, each a text; it finds no
    name that has no schema. Raises BadSqlFile and a DatabaseFault.
    """
    path = (ddl_folder or files.folder("ddl")) / pack / "check.sql"
    if not path.is_file():
        return []
    file = sql_files.read(path, pack=pack, schema=schema)
    try:
        async with connection.transaction(readonly=True):
            await connection.execute("set local search_path = ''")
            rows = await connection.fetch(file.text)
    except DRIVER_ERRORS as error:
        raise explain(error, place=f" in {file.name}") from None
    return [Problem(row["place"], row["problem"], row["remedy"]) for row in rows]


async def count_watched(connection: Connection) -> int:
    """How many tables are watched. Raises a DatabaseFault."""
    try:
        return int(await connection.fetchval(query("count_watched")))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
