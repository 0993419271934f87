"""Notices rows that read otherwise after their table or a type was altered, of which no trigger tells."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0018"
down_revision = "rowcast_0017"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
