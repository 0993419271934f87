"""The command types."""

import json

import click

from daemon.cli.options import Options


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
@click.pass_obj
def types(options: Options, *, form: str | None, numbers: str) -> None:
    """Print what the packs publish, in a form for other programs."""
    from daemon.contracts.asyncapi import asyncapi
    from daemon.contracts.schema import json_schema
    from daemon.contracts.typescript import typescript
    from daemon.core.change import Numbers
    from daemon.packs import by_schema

    if form is None:
        raise click.UsageError("choose --typescript, --json-schema or --asyncapi")
    packs = list(by_schema(options.settings.schemas).values())
    if form == "typescript":
        click.echo(typescript(packs, Numbers(numbers)), nl=False)
    else:
        click.echo(json.dumps(asyncapi(packs) if form == "asyncapi" else json_schema(packs), indent=2))
