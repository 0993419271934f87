"""The command jobs and its subcommand."""

from pathlib import Path

import click

from daemon.cli.options import Options, data_dir_option, run


@click.group(invoke_without_command=True)
@data_dir_option("Data directory of the `daemon up` to look at.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_context
def jobs(ctx: click.Context, *, data_dir: Path | None, as_json: bool) -> None:
    """Show each job's last and next run, or run one."""
    options: Options = ctx.obj
    ctx.obj = options.having(data_dir=data_dir).quiet()
    if ctx.invoked_subcommand is None:
        from daemon.commands.jobs import show

        settings = ctx.obj.local_settings
        run(settings, show(settings, as_json=as_json))


@jobs.command("run")
@click.argument("name")
@click.pass_obj
def run_(options: Options, *, name: str) -> None:
    """Run the job NAME here at once, and all runs of it that were missed."""
    from daemon.commands.jobs import run_job

    settings = options.local_settings
    run(settings, run_job(settings, name))
