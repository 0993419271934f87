"""The command types."""

import json
from pathlib import Path

import click

from daemon.cli.options import Options, data_dir_option, run
from daemon.settings.local import with_local_instance


@click.command()
@click.option("--typescript", "form", flag_value="typescript", help="Print types for the JavaScript client.")
@click.option("--json-schema", "form", flag_value="json-schema", help="Print one JSON Schema of all frames and rows.")
@click.option("--asyncapi", "form", flag_value="asyncapi", help="Print the protocol as an AsyncAPI document.")
@click.option(
    "--numbers",
    type=click.Choice(["json", "string"]),
    default="json",
    help="The form of exact numbers in --typescript, as in `new Rowcast(url, { numbers })` (default json).",
)
@data_dir_option("Data directory of the `daemon up` whose tables to print, too.")
@click.pass_obj
def types(options: Options, *, form: str | None, numbers: str, data_dir: Path | None) -> None:
    """Print what is published, in a form for other programs. Tables of yours, too, if a database is configured."""
    from daemon.contracts.asyncapi import asyncapi
    from daemon.contracts.schema import json_schema
    from daemon.contracts.typescript import typescript
    from daemon.core.change import Numbers
    from daemon.packs import Pack, by_schema

    if form is None:
        raise click.UsageError("choose --typescript, --json-schema or --asyncapi")

    def show(packs: list[Pack]) -> None:
        if form == "typescript":
            click.echo(typescript(packs, Numbers(numbers)), nl=False)
        else:
            click.echo(json.dumps(asyncapi(packs) if form == "asyncapi" else json_schema(packs), indent=2))

    settings = options.having(data_dir=data_dir).quiet().settings
    packs = list(by_schema(settings.schemas).values())
    if data_dir is not None:
        settings = with_local_instance(settings)
    if settings.dsn is None:
        show(packs)
        return
    from daemon.commands.watch import own_packs

    async def show_all() -> None:
        show([*packs, *await own_packs(settings)])

    run(settings, show_all())
