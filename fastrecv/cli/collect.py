"""`fastrecv collect`: a flow collector, whose workers `fastrecv run` would start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fastrecv.cli.arguments import seconds
from fastrecv.cli.run import Row, run, serve
from fastrecv.workers import Settings
from fastrecv.workers.settings import SettingError

if TYPE_CHECKING:
    from fastrecv.collector.settings import CollectorSettings

__all__ = ["collect"]

_HANDLER = "fastrecv.collector.handler:Collector"
_LONGEST = 86400.0
_LEAST_FLUSH = 0.01  # seconds: to look more often costs more than it gains


def _sink(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        _needed()
        from fastrecv.sinks import parsed  # noqa: PLC0415 - an extra

        try:
            parsed(value)
        except (ImportError, ValueError) as error:
            raise click.BadParameter(str(error)) from None
    return value


def _keys(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    _needed()
    from fastrecv.collector.keys import checked  # noqa: PLC0415 - an extra

    try:
        return checked([key.strip() for key in value.split(",")])
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _flush(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if 0 < value < _LEAST_FLUSH:
        raise click.BadParameter(f"{value:g}: give 0, or {_LEAST_FLUSH} seconds or more")
    return value


def _needed() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise click.UsageError("the collector needs pyarrow: pip install 'fastrecv[flow]'")


@click.command()
@click.option("--sink", envvar="FASTRECV_SINK", required=True, callback=_sink, metavar="URL",
              help="Where flows go: parquet:/var/lib/flows?rotate=60s, jsonl:-, jsonl:/file and others.")  # fmt: skip
@click.option("--aggregate", callback=_keys, metavar="NAME,...",
              help="Sum flows up, a row for each of these information elements together: "
              "exporterAddress,sourceIPv4Address.  [default: every flow is a row]")  # fmt: skip
@click.option("--window", type=seconds(0.1, _LONGEST), default=60.0, show_default=True,
              help="Seconds of arrival that --aggregate sums up, and that --exporters counts.")  # fmt: skip
@click.option("--exporters", envvar="FASTRECV_EXPORTERS", callback=_sink, metavar="URL",
              help="Where a row for each exporter and window goes: datagrams, flows, what was lost, unknown, "
              "malformed.  [default: nowhere]")  # fmt: skip
@click.option("--flush", type=seconds(0, _LONGEST), callback=_flush, default=1.0, show_default=True,
              help="Seconds that a flow waits at most until the sink has it; 0: after every batch of datagrams, before "
              "that counts as handled.")  # fmt: skip
@click.option("--shards", type=int, default=1, show_default=True, metavar="N",
              help="Subjects, a power of two up to 4096, among which a nats: or tls: sink deals rows by the exporter's "
              "address: of every host with the same N an exporter's are in the same one.")  # fmt: skip
def collect(
    sink: str, aggregate: tuple[str, ...], window: float, exporters: str | None, flush: float, shards: int,
    config: str | None, check: bool, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Collect flows: NetFlow v5, NetFlow v9 and IPFIX over UDP, as rows with IANA's names for their columns.

    Exporters keep their worker, and their templates outlive it. Further options, signals, exit codes and `fastrecv
    workers` are those of `fastrecv run`.

    Sinks may stand in the environment instead, FASTRECV_SINK and FASTRECV_EXPORTERS: a password in them is then not in
    everybody's list of processes.

    \b
    fastrecv collect -b 0.0.0.0:2055 --sink jsonl:-
    fastrecv collect -b 0.0.0.0:2055 -w 4 --user nobody --sink parquet:/var/lib/flows
    fastrecv collect -b 0.0.0.0:2055 --sink parquet:/var/lib/flows \\
        --aggregate exporterAddress,sourceIPv4Address,destinationTransportPort --exporters jsonl:/var/log/exporters
    fastrecv collect -b 0.0.0.0:2055 --shards 64 --sink 'nats://nats1,nats2/flows?stream=FLOWS&spool=/var/lib/flows'
    """  # noqa: D301 - click wants the character
    from fastrecv.collector.settings import CollectorSettings  # noqa: PLC0415 - an extra

    try:
        settings = CollectorSettings(
            sink=sink, exporters=exporters, aggregate=aggregate, window=window, flush=flush, shards=shards
        )
    except ValueError as error:  # what can be wrong with the others was looked at before
        raise click.BadParameter(str(error), param_hint="--shards") from None
    settings.give()
    return serve(options | {"handler": _HANDLER}, config, check, as_json, fitting=_over_udp, own=_rows(settings))


def _over_udp(settings: Settings) -> None:
    if (settings.bind or "").startswith("tcp:"):
        raise SettingError("bind", "flows come over UDP: leave tcp: out")


def _rows(settings: CollectorSettings) -> Iterator[Row]:
    """What --check says of the collector's own settings; without passwords."""
    from fastrecv.sinks.urls import hidden  # noqa: PLC0415 - an extra

    context, default = click.get_current_context(), ParameterSource.DEFAULT
    said = {
        "sink": hidden(settings.sink),
        "exporters": None if settings.exporters is None else hidden(settings.exporters),
        "aggregate": ",".join(settings.aggregate) or None,
        "window": settings.window,
        "flush": settings.flush,
        "shards": settings.shards,
    }
    for parameter in context.command.params:
        if isinstance(parameter, click.Option) and parameter.name in said:
            sources = {ParameterSource.COMMANDLINE: parameter.opts[0], ParameterSource.ENVIRONMENT: parameter.envvar}
            source = sources.get(context.get_parameter_source(parameter.name) or default, "default")
            yield parameter.name, said[parameter.name], str(source)


collect.params += [parameter for parameter in run.params if parameter.name != "handler"]
