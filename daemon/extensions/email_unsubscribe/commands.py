"""The verb `rotate-token-keys`."""

from typing import Final

import click

from daemon.extensions import CommandOptions
from daemon.settings import Settings


@click.command("rotate-token-keys")
@click.pass_obj
def rotate_token_keys(options: CommandOptions) -> None:
    """Re-encrypt OAuth tokens with the first key. They are those of email_unsubscribe."""
    settings = options.having(packs=("email_unsubscribe",)).quiet().settings
    options.run(settings, _rotate(settings))


async def _rotate(settings: Settings) -> None:
    from daemon.extensions.email_unsubscribe.store import rotate_token_keys

    renewed = await rotate_token_keys(settings)
    click.echo(f"re-encrypted the tokens of {renewed} account{'' if renewed == 1 else 's'}")


COMMANDS: Final = (rotate_token_keys,)
