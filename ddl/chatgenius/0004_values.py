"""What counts as an address, a name or a URL."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0004"
down_revision = "chatgenius_0003"
compatible_with = "chatgenius_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
