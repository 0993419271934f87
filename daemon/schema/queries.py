"""The statements of queries.sql."""

from pathlib import Path

from daemon.postgres.queries import Queries

query = Queries(Path(__file__).with_suffix(".sql"))


def query_for(name: str, schema: str) -> str:
    """A statement about one schema, whose name must have been checked: it is put in without quotes."""
    return query(name).replace("the_schema", schema)
