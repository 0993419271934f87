"""Rules of a secret's life that hold for every write, and what counts as an address or a name."""

from daemon.schema.revisions import run_sql

revision = "disclosure_0005"
down_revision = "disclosure_0004"
compatible_with = "disclosure_0004"


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
