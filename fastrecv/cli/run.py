"""`fastrecv run`: a service of worker processes that lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import click
import msgspec

from fastrecv.cli import output
from fastrecv.workers import Settings, Supervisor
from fastrecv.workers.config import FILE, ConfigError, gathered
from fastrecv.workers.settings import MAX_WORKERS, SettingError

__all__ = ["Row", "run", "serve"]

Row: TypeAlias = tuple[str, Any, str]
"""Of --check: key, value, and where that comes from."""

_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Settings)}


def _by_default(name: str, text: str) -> str:
    """The help of an option whose default is that of the setting: given to click it would hide file and environment."""
    return f"{text}  [default: {_DEFAULTS[name]}]"


def _one(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> str | None:
    if len(given) > 1:
        raise click.BadParameter("one service has one address: run one for each")
    return given[0] if given else None


@click.command()
@click.argument("handler", metavar="[PACKAGE.MODULE:NAME]", required=False)
@click.option("-c", "--config", metavar="FILE", help=f"A TOML file of settings.  [default: {FILE}]")
@click.option("-b", "--bind", metavar="[tcp:]ADDRESS:PORT", multiple=True, callback=_one,
              help="[ADDRESS]:PORT for IPv6; tcp: for connections.  [default: what systemd passes]")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "socket", "xdp"]), help=_by_default("backend",
              "What datagrams come by: sockets alone; or AF_XDP before them, past firewall and stack, where a worker "
              "that is killed takes what its rings hold with it; auto: AF_XDP where it can be had."))  # fmt: skip
@click.option("-w", "--workers", type=click.IntRange(1, MAX_WORKERS),
              help="Each has a socket of its own.  [default: 1, or as many as systemd passes sockets]")  # fmt: skip
@click.option("--policy", help=_by_default("policy",
              "Whose datagrams stay with one worker: source[/BITS4[/BITS6]], source+port, flow, destination, "
              "payload[OFFSET:LENGTH], quic[LENGTH], cpu, random, queue."))  # fmt: skip
@click.option("--user", metavar="NAME", help="Whom workers become.  [default: who calls]")
@click.option("--group", metavar="NAME", help="[default: the user's]")
@click.option("--timeout", type=float, help=_by_default("timeout",
              "Seconds without a sign of life until a worker is replaced; 0: for ever."))  # fmt: skip
@click.option("--graceful-timeout", type=float, help=_by_default("graceful_timeout",
              "Seconds that workers have to stop in."))  # fmt: skip
@click.option("--batch-size", type=int, help=_by_default("batch_size", "Datagrams of a batch at most."))
@click.option("--receive-buffer", type=int, metavar="BYTES",
              help="Of each socket, for what waits meanwhile.  [default: net.core.rmem_default]")  # fmt: skip
@click.option("--on-error", type=click.Choice(["continue", "exit"]), help=_by_default("on_error",
              "What a worker does when its handler raises an exception."))  # fmt: skip
@click.option("--given-up", type=click.Choice(["move", "wait"]), help=_by_default("given_up",
              "What becomes of the senders of a worker that dies at once, again and again."))  # fmt: skip
@click.option("--cpus", metavar="LIST", help="CPUs of workers, one each, round and round, like 0-3,6.  [default: any]")
@click.option("--nice", type=int, help="Of workers, -20 to 19.  [default: as nice as who calls]")
@click.option("--limit", "limits", metavar="NAME=VALUE", multiple=True,
              help="Of each worker, by setrlimit(2), soft and hard: nofile=1024, as=1G, core=unlimited.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), help=_by_default("log_format",
              "Of what is said on standard error: lines, or a JSON object a line."))  # fmt: skip
@click.option("--control", metavar="PATH",
              help="Socket for `fastrecv workers` and `fastrecv top`.  [default: PORT.sock, or tcp-PORT.sock, in "
              "$RUNTIME_DIRECTORY, else as root in /run/fastrecv, else in $XDG_RUNTIME_DIR/fastrecv]")  # fmt: skip
@click.option("--metrics", metavar="ADDRESS:PORT", help="Serve /metrics, /healthz, /readyz over HTTP.  [default: not]")
@click.option("--check", is_flag=True, help="Print the settings that would hold, and where each comes from.")
@output.json_option
def run(config: str | None, check: bool, as_json: bool, **options: Any) -> int:
    """Serve datagrams, or connections, by worker processes whose sockets outlive them.

    The handler is a function handle(batch), plain or async; a class with handle(batch) and perhaps start(), stop(), and
    snapshot() with restore(data), by which its state outlives a worker; or serve(sockets), with a loop of its own, for
    connections. It is imported by the workers only, without capabilities.

    Every option has the same name in a TOML file (receive-buffer = 8388608; [limits] is a table) and in the environment
    (FASTRECV_RECEIVE_BUFFER; FASTRECV_LIMITS="nofile=1024,core=0"). Options come before the environment, and that
    before the file, which USR2 reads again.

    With --backend xdp each worker reads queues of the interface, beside its socket; with several workers these, and no
    policy but queue, decide who gets a sender. A restart loses nothing that --receive-buffer has room for. A worker
    that is killed loses what was in its rings, up to 2048 datagrams a queue, when none of a socket's are lost; the log
    says at the end how many.

    TERM or INT: stop, queues are read to their end. QUIT: at once. HUP: restart the workers with new code, one after
    the other. TTIN, TTOU: one worker more or less. USR2: new code and configuration for the supervisor itself, in
    place. `fastrecv workers` does the same, `fastrecv top` looks on.

    Exit codes: 0 stopped; 1 it could not begin, all workers were given up, or queues were lost at the deadline; 2
    usage, or settings that make no sense; 77 a privilege is missing.

    \b
    fastrecv run -b 0.0.0.0:2055 -w 4 --user nobody mypkg.collector:handle
    fastrecv run --config collector.toml --workers 8
    fastrecv run -b 192.0.2.1:2055 --backend xdp -w 2 --policy queue mypkg.collector:handle
    """  # noqa: D301 - click wants the character
    return serve(options, config, check, as_json)


def serve(
    options: dict[str, Any], config: str | None, check: bool, as_json: bool, *,
    fitting: Callable[[Settings], None] = lambda _: None, own: Iterable[Row] = (),
) -> int:  # fmt: skip
    """Run the service of these options; the exit code. With `check` its settings are printed instead.

    fitting : raises SettingError where the service itself cannot do with a setting. own : what it has besides.
    """
    if as_json and not check:
        raise click.UsageError("--json is for --check: a running service has --log-format json")
    try:
        found = gathered(options, config)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        fitting(found.settings)
        supervisor = Supervisor(found.settings)
    except SettingError as error:
        raise click.UsageError(found.explained(error)) from None
    if check:
        _print([*own, *found.rows()], as_json)
        return 0
    try:
        return supervisor.run()
    except SettingError as error:
        raise click.UsageError(found.explained(error)) from None


def _print(rows: list[Row], as_json: bool) -> None:
    if as_json:
        output.as_json({key: {"value": value, "source": source} for key, value, source in rows})
        return
    output.table(("setting", "value", "source"), [
        (key, "-" if value is None else str(value), source) for key, value, source in rows
    ])  # fmt: skip
