"""The record of the jobs: when each is due, who runs it, and how the last run ended."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0010"
down_revision = "rowcast_0009"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
