"""The statements in queries.sql, by name."""

from pathlib import Path

from daemon.postgres.queries import Queries

query = Queries(Path(__file__).with_suffix(".sql"))
