"""One platform from author to reply, escalations about one post, no dates ahead, names; where archive files are."""

from daemon.schema.revisions import run_sql

revision = "antone_0007"
down_revision = "antone_0006"
compatible_with = "antone_0006"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
