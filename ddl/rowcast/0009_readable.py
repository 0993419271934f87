"""Moves the check of other encodings than UTF8 out of the statement that numbers events."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0009"
down_revision = "rowcast_0008"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
