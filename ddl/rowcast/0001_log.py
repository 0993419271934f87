"""Events, the log that orders them, and the functions that packs use."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0001"
down_revision = None


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
