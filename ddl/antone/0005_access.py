"""Who may read which topic, and the role that the application connects as."""

from daemon.schema.revisions import run_sql

revision = "antone_0005"
down_revision = "antone_0004"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
