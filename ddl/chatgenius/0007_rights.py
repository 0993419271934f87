"""Whoever asks for one topic waits for no table that only others need."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0007"
down_revision = "chatgenius_0006"
compatible_with = "chatgenius_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
