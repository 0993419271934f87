"""Failed attempts are counted, duplicates in the log are removed and refused, a batch is read from an index."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0002"
down_revision = "disclosure_0001"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
