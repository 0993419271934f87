"""What is too large to be told, and how large the rest is."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0003"
down_revision = "rowcast_0002"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
