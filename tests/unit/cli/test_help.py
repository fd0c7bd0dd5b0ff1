"""`p2pllm --help` answers at once, and every command explains itself."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from p2pllm_cli.main import cli

HEAVY = ("torch", "transformers", "hivemind", "numpy", "pydantic", "rich", "multiaddr", "psutil")


def test_help_imports_nothing_heavy() -> None:
    look = (
        "import sys, contextlib, io\n"
        "from p2pllm_cli.main import main\n"
        "sys.argv = ['p2pllm', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert 'First steps' in shown.getvalue()\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60)
    assert found.stderr == "" and found.stdout == "\n"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert cli.commands[name].help
    for parameter in cli.commands[name].params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_the_list_of_commands_is_not_cut_off() -> None:
    result = CliRunner().invoke(cli, ["--help"], terminal_width=80)
    assert "..." not in result.output.partition("Commands:")[2]
    assert all(name in result.output for name in cli.commands)


def test_version_is_the_package_version() -> None:
    from p2pllm import __version__

    assert CliRunner().invoke(cli, ["--version"]).output == f"p2pllm, version {__version__}\n"
