"""Views of the rows that are not deleted, and may_read."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0003"
down_revision = "chatgenius_0002"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
