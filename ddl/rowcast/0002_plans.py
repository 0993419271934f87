"""The view of the log and the purge, written so that no plan scans all events."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0002"
down_revision = "rowcast_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
