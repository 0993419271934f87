"""The eight tables with their keys, checks and indexes."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0001"
down_revision = None


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
