"""Who is present, and what devices have acknowledged."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0013"
down_revision = "rowcast_0012"
compatible_with = "rowcast_0007"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
