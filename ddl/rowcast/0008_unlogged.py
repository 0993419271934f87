"""Notices a crash of Postgres, which empties unlogged tables."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0008"
down_revision = "rowcast_0007"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
