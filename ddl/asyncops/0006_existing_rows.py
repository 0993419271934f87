"""Applies the rules of 0005 to existing rows."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0006"
down_revision = "asyncops_0005"
compatible_with = "asyncops_0004"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
