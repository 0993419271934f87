"""The canary: one row that a daemon writes to time the whole path."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0014"
down_revision = "rowcast_0013"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
