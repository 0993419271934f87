"""The statements of queries.sql."""

from pathlib import Path

from daemon.postgres.queries import Queries, named

query = Queries(Path(__file__).with_suffix(".sql"))


def query_for(name: str, schema: str) -> str:
    """A statement for one schema. The name is inserted without quotes, so it must have been checked."""
    return named(query(name).replace("the_schema", schema), name)
