"""One normal form of an address, whatever its letters, blanks and Unicode form; names and URLs."""

from daemon.schema.revisions import run_sql

revision = "email_unsubscribe_0004"
down_revision = "email_unsubscribe_0003"
compatible_with = "email_unsubscribe_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
