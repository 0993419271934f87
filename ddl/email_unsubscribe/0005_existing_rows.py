"""Brings existing rows into the normal form of 0004, and merges those that were one."""

from daemon.schema.revisions import run_sql

revision = "email_unsubscribe_0005"
down_revision = "email_unsubscribe_0004"
compatible_with = "email_unsubscribe_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
