"""Reopening, authors who are deactivated, days that have not begun, addresses and names."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0005"
down_revision = "asyncops_0004"
compatible_with = "asyncops_0004"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
