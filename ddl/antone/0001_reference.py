"""The enum types, and the lookup tables whose rows may change without a revision."""

from daemon.schema.revisions import run_sql

revision = "antone_0001"
down_revision = None


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
