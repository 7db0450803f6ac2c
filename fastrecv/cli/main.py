"""The command itself, and what becomes of every error: one line, and an exit code.

Exit codes: 0 done; 1 refused or failed, nothing changed; 2 usage; 77 a privilege or a kernel feature is missing; 130
interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from errno import EACCES, EPERM
from typing import Any

import click
from click.shell_completion import get_completion_class

from fastrecv.cli.balance import balance
from fastrecv.cli.collect import collect
from fastrecv.cli.connect import connect
from fastrecv.cli.doctor import MISSING, doctor
from fastrecv.cli.listen import listen
from fastrecv.cli.lookup import lookup
from fastrecv.cli.run import run as run_service
from fastrecv.cli.top import top
from fastrecv.cli.watch import watch
from fastrecv.cli.workers import workers
from fastrecv.errors import NotSupported
from fastrecv.rules import RuleSetError

__all__ = ["run"]

_FAILED = 1
_INTERRUPTED = 128 + signal.SIGINT


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


fastrecv.add_command(lookup)
fastrecv.add_command(balance)
fastrecv.add_command(doctor)
fastrecv.add_command(listen)
fastrecv.add_command(connect)
fastrecv.add_command(watch)
fastrecv.add_command(run_service)
fastrecv.add_command(collect)
fastrecv.add_command(workers)
fastrecv.add_command(top)


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
