"""The contents of a database's catalog as a value, to compare two databases."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import asyncpg


async def catalog(dsn: str, schemas: Collection[str]) -> dict[str, dict[str, Any]]:
    """Every object of the schemas, by kind and name, with its definition, owner, privileges and comment.

    Also the names of all other schemas, and the database's extensions, publications and event triggers.
    """
    connection = await asyncpg.connect(dsn, server_settings={"search_path": ""})
    try:
        query = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
        rows = await connection.fetch(query, list(schemas))
    finally:
        await connection.close()
    found = {row["what"]: json.loads(row["facts"]) for row in rows}
    assert len(rows) == len(found), "two objects of one name"
    for facts in found.values():
        if facts.get("acl"):
            facts["acl"].sort()  # grants are stored in the order in which they were made
    return found


async def contents(dsn: str, schema: str) -> dict[str, int]:
    """How many rows each table of a schema has."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch(
            "select c.oid::regclass::text as name from pg_class as c"
            " where c.relnamespace = $1::text::regnamespace and c.relkind in ('r', 'p') order by 1",
            schema,
        )
        return {row["name"]: await connection.fetchval(f"select count(*) from {row['name']}") for row in tables}
    finally:
        await connection.close()
