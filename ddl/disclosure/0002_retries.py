"""Columns about retries, an index that keeps sent entries unique, and an index for batch queries."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0002"
down_revision = "disclosure_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
