"""Notices rows that went with their partition, of which no trigger tells."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0017"
down_revision = "rowcast_0016"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
