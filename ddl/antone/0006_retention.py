"""What is old enough to be archived, as views: the retention policy."""

from daemon.schema.revisions import run_sql

revision = "antone_0006"
down_revision = "antone_0005"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
