"""The tables that are served without a pack: their topics, and who may read these."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0012"
down_revision = "rowcast_0011"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
