"""The tables, without the columns about retries."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0001"
down_revision = None


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
