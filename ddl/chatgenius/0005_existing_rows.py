"""Checks that existing rows follow the rules of 0004."""

from daemon.schema.revisions import run_sql

revision = "chatgenius_0005"
down_revision = "chatgenius_0004"
compatible_with = "chatgenius_0003"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
