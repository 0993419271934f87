"""What a reader needs to know before it reads, and replica identities."""

from daemon.schema.revisions import run_sql

revision = "rowcast_0006"
down_revision = "rowcast_0005"
compatible_with = "rowcast_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
