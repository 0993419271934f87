"""Triggers: normalised addresses, derived senders, and the audit log."""

from daemon.schema.revisions import run_sql

revision = "email_unsubscribe_0002"
down_revision = "email_unsubscribe_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
