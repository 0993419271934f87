"""Whoever asks for one topic waits for no table that only others need."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0007"
down_revision = "disclosure_0006"
compatible_with = "disclosure_0004"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
