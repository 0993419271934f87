"""Triggers: updated_at, and decisions that are deleted before their post."""

from daemon.schema.revisions import run_sql

revision = "antone_0004"
down_revision = "antone_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
