"""The retention policy: views of the rows that are old enough to be archived."""

from daemon.schema.revisions import run_sql

revision = "antone_0006"
down_revision = "antone_0005"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
