"""The life of a secret: what a check-in does, and the functions that a job calls."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0003"
down_revision = "disclosure_0002"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
