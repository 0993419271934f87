"""user_status follows presence, and sync_state what devices acknowledge."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0006"
down_revision = "chatgenius_0005"
compatible_with = "chatgenius_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
