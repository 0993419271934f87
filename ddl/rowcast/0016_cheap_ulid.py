"""Ids made with fewer function calls."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0016"
down_revision = "rowcast_0015"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
