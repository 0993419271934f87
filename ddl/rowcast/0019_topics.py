"""The log is indexed by a hash of the topic, which takes less than half of what the topic took."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0019"
down_revision = "rowcast_0018"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
