"""may_read."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0004"
down_revision = "disclosure_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
