"""The tables with their keys, checks and indexes."""

from daemon.schema.revisions import run_sql

revision = "antone_0003"
down_revision = "antone_0002"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
