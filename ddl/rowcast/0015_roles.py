"""What a daemon does beyond reading and writing the log's rows runs with the rights of the owner."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0015"
down_revision = "rowcast_0014"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
