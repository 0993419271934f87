"""Views of the rows that are not archived, and may_read."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0003"
down_revision = "asyncops_0002"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
