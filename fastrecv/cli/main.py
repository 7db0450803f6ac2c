"""The command itself, and what becomes of every error: one line, and an exit code.

Exit codes: 0 done; 1 refused or failed, nothing changed; 2 usage; 77 a privilege or a kernel feature is missing; 130
interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from errno import EACCES, EPERM
from typing import Any

import click
from click.shell_completion import get_completion_class

from fastrecv.cli.doctor import MISSING, doctor
from fastrecv.errors import NotSupported
from fastrecv.rules import RuleSetError

__all__ = ["run"]

_FAILED = 1
_INTERRUPTED = 128 + signal.SIGINT
_ELSEWHERE = ("balance", "collect", "connect", "listen", "lookup", "run", "top", "watch", "workers")


class _Commands(click.Group):
    """A command's module has its name, and is imported when it is called: all together take longer than most do."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        found = getattr(importlib.import_module(f"fastrecv.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fastrecv", message="fastrecv %(version)s")
def fastrecv() -> None:
    """Steer packets to sockets.

    Exit codes: 0 done, 1 refused or failed, 2 usage, 77 a privilege or a kernel feature is missing.
    """


@fastrecv.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, for its start-up file: eval "$(fastrecv completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(fastrecv, {}, "fastrecv", "_FASTRECV_COMPLETE").source())


fastrecv.add_command(doctor)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code."""
    try:
        result: Any = fastrecv.main(args=arguments, prog_name="fastrecv", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fastrecv"
        click.echo(f"{where}: {' '.join(error.format_message().split())} (see {where} --help)", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush has no reader
        return _FAILED
    except (OSError, RuleSetError) as error:
        click.echo(f"fastrecv: {_one_line(error)}", err=True)
        missing = isinstance(error, NotSupported) or getattr(error, "errno", None) in (EPERM, EACCES)
        return MISSING if missing else _FAILED
    return result if isinstance(result, int) else 0


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror
        if error.filename is not None:
            denied = "permission denied (run as root; to read, as a member of the group that was given with --group)"
            text = f"{error.filename}: {denied if isinstance(error, PermissionError) else text}"
    return " ".join(text.split())
