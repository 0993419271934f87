"""Functions for the first admin, daily summaries and archiving; and the application's role."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0004"
down_revision = "asyncops_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
