"""Checks of the capture triggers of watched tables, and of the packs' schemas, in a live database."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemon import files
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import sql_files
from daemon.schema.queries import query

# rowcast.watch() restores triggers that are missing or disabled, but does not look at anything else: unwatch() has to
# remove that first.
_REAPPLY: Final = "run `daemon --apply-ddl`, or call rowcast.watch() again if the table belongs to no pack"
_RECREATE: Final = "call rowcast.unwatch() and rowcast.watch() for it in one transaction"

_TRIGGER: Final = "its capture trigger on {place} for {operations} "
_PROBLEMS: Final = {
    "gone": (
        "the table was dropped or renamed",
        "rename it back, or call rowcast.unwatch_dropped() if it was dropped",
    ),
    "function_missing": ("its capture function {place} is missing", _REAPPLY),
    "function_altered": ("its capture function {place} differs from what rowcast.watch() created", _RECREATE),
    "function_owner": ("its capture function {place} is not owned by rowcast_capture", _RECREATE),
    "missing": (_TRIGGER + "is missing", _REAPPLY),
    "disabled": (_TRIGGER + "is disabled", _REAPPLY),
    "replica": (_TRIGGER + "fires in replica mode only", _REAPPLY),
    "not_always": (_TRIGGER + "is not ENABLE ALWAYS, as per_row requires", _REAPPLY),
    "always": (_TRIGGER + "is ENABLE ALWAYS, so replication would fire it too", _REAPPLY),
    "trigger_altered": (_TRIGGER + "differs from what rowcast.watch() created", _RECREATE),
    "stray": ("{place} is captured as this table", "drop its triggers {operations}, or attach or rename it back"),
    "subscription": (
        "a subscription writes to {place}, but replication does not fire statement triggers",
        "call rowcast.watch() for it again with per_row => true",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a watched table, or another object of a pack's schema, differs from its definition."""

    table: str  # qualified, and quoted where SQL requires it; or the name of another object
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.table}: {self.problem}: {self.remedy}"


async def check_captures(connection: Connection) -> list[Problem]:
    """Problems with the capture of watched tables, by table. Needs Rowcast's own schema. Raises a DatabaseFault."""
    try:
        rows = await connection.fetch(query("capture_problems"))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    problems = []
    for row in rows:
        problem, remedy = _PROBLEMS[row["problem"]]
        if row["cloned"]:  # watch() looks at the parent's trigger only, which may be fine
            remedy = _RECREATE
        facts = {"place": row["place"], "operations": row["operations"]}
        problems.append(Problem(row["name"], problem.format(**facts), remedy.format(**facts)))
    return problems


async def check_rules(
    connection: Connection, pack: str, schema: str, *, ddl_folder: Path | None = None
) -> list[Problem]:
    """The problems that ddl/<pack>/check.sql finds in the pack's schema; none if the pack has no such file.

    The file is one read-only query with the text columns `place`, `problem` and `remedy`. It runs with an empty
    search_path, so its names must be qualified. Raises BadSqlFile and a DatabaseFault.
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
    """The number of watched tables. Raises a DatabaseFault."""
    try:
        return int(await connection.fetchval(query("count_watched")))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
