"""The first rows of the reference tables; data only."""

from daemon.schema.revisions import run_sql

revision = "antone_0002"
down_revision = "antone_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
