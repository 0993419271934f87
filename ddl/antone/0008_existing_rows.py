"""Checks that existing rows follow the rules of 0007."""

from daemon.schema.revisions import run_sql

revision = "antone_0008"
down_revision = "antone_0007"
compatible_with = "antone_0006"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
