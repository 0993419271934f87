"""Triggers: updated_at, and children that are deleted before their message."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0002"
down_revision = "chatgenius_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
