"""`p2pllm`: the group of commands, and the one place where errors become a sentence and an exit code.

Everything heavy is imported inside a command, so that `p2pllm --help` answers at once.
"""

from __future__ import annotations

import sys

import click

from p2pllm import __version__
from p2pllm.errors import P2PLLMError
from p2pllm_cli import (
    checkpoint,
    dashboard,
    disk,
    doctor,
    explain,
    guest,
    lab,
    local,
    log,
    metrics,
    model,
    peer,
    service,
    verify,
)


class _InOrder(click.Group):
    """Lists commands as they are registered: those that come first in a run come first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="p2pllm")
def cli() -> None:
    """Train one language model on many people's machines, with nobody in charge.

    \b
    First steps:
      p2pllm new run.toml       write a commented run file
      p2pllm start run.toml     found the run; prints the invite
      p2pllm join p2pllm:...    take part, from any machine
    """


for command in (
    peer.new,
    doctor.doctor,
    peer.start,
    peer.join,
    local.status,
    dashboard.dashboard,
    guest.pause,
    guest.resume,
    guest.set_,
    local.leave,
    disk.runs,
    disk.clean,
    service.service,
    explain.explain,
    local.logs,
    log.rounds,
    metrics.metrics,
    log.credits_,
    verify.verify,
    log.peers,
    checkpoint.checkpoint,
    model.generate,
    model.export,
    lab.swarm,
    lab.lab,
):
    cli.add_command(command)


def main() -> None:
    """Run a command: 0 done, 1 the run failed, 2 usage; every foreseen error is one sentence on stderr."""
    try:
        code = cli.main(prog_name="p2pllm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.exceptions.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except P2PLLMError as error:
        click.echo(f"p2pllm: {error}", err=True)
        if sys.stderr.isatty():
            click.echo(f"More about it: p2pllm explain {explain.page_of(error)}", err=True)
        code = error.exit_code
    except OSError as error:
        click.echo(f"p2pllm: {error.filename or 'A file'} cannot be used: {error.strerror}.", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
