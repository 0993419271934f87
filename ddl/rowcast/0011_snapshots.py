"""The rows of a topic: how they are found, and the function that reads them."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0011"
down_revision = "rowcast_0010"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
