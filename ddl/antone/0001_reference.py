"""The static types, and the tables of words that may change without a revision."""

from daemon.schema.revisions import run_sql

revision = "antone_0001"
down_revision = None


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
