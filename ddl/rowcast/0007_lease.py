"""The leader's lease, terms with a nonce, and events that cannot be numbered."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0007"
down_revision = "rowcast_0006"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
