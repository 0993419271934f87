"""An id function that means the same on every search_path."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0005"
down_revision = "rowcast_0004"
compatible_with = "rowcast_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
