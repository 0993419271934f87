"""Triggers: updated_at, resolved_at, authors, and the audit log."""

from daemon.schema.revisions import run_sql

revision = "asyncops_0002"
down_revision = "asyncops_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
