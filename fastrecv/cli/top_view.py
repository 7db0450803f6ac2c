"""What `fastrecv top` shows, on any terminal of 80 columns or more."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastrecv.cli.rates import History, Rates
from fastrecv.cli.workers import span
from fastrecv.workers.status import Service, Worker

__all__ = ["screen", "short", "sparkline"]

_BARS = " ▁▂▃▄▅▆▇█"
_BESIDE = 70  # columns that all but the sparkline take: those below, with a space behind each
_WIDEST = 60  # columns of the sparkline
_ABOVE = 7  # lines beside those of the workers
_COLUMNS = {  # with their widths, so that nothing jumps
    "": 3, "pid": 8, "dgram/s": 7, "Mbit/s": 6, "batch": 5, "ns/dgram": 8, "busy": 4, "queue": 5, "drops/s": 7,
    "re/died": 7,
}  # fmt: skip


def screen(service: Service | None, history: History, notice: str | None, width: int, height: int) -> RenderableType:
    """One picture. notice : why the service is not as it was a moment ago, or not at all."""
    foot = Text.assemble(("q ends  ", "dim"), (notice or "", "bold red"), no_wrap=True, overflow="ellipsis")
    if service is None:
        return foot
    room = max(1, height - _ABOVE)
    shown = service.workers[:room]
    return Group(*_head(service), _table(service, shown, history, width, stale=notice is not None),
                 *_left_out(len(service.workers) - len(shown)), foot)  # fmt: skip


def _head(service: Service) -> list[Text]:
    style = "bold green" if service.state == "running" and service.unready is None else "bold yellow"
    lines = [
        Text.assemble((service.address, "bold"), f"  {service.handler}  ", (service.state, style),
                      f"  up {span(service.uptime)}", no_wrap=True, overflow="ellipsis"),
        Text(f"process {service.pid}, senders by {service.policy} ({service.chooser}), "
             f"{len(service.workers)} of {service.wanted} wanted workers", no_wrap=True, overflow="ellipsis"),
    ]  # fmt: skip
    why = service.failure or service.unready
    lines.append(Text(why or "", style="yellow", no_wrap=True, overflow="ellipsis"))
    return lines


def _left_out(count: int) -> list[Text]:
    return [Text(f"and {count} more workers, in a higher window", style="dim")] if count > 0 else []


def _table(service: Service, shown: list[Worker], history: History, width: int, *, stale: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, style="dim" if stale else "", header_style="dim")
    for name, width_of in _COLUMNS.items():
        table.add_column(name, justify="right", no_wrap=True, width=width_of)
    across = max(9, min(_WIDEST, width - _BESIDE))
    table.add_column("last 60 s", no_wrap=True, width=across)
    lines = {worker.slot: history.line(worker.slot, across) for worker in shown}
    highest = max((value for line in lines.values() for value in line), default=0.0)
    queued = sum(worker.queue_bytes for worker in service.workers)
    limit = sum(worker.queue_limit for worker in service.workers)
    whole = history.line(None, across)
    total = service.total
    table.add_row(
        "all", "", *_rates(history.rates.get(None)), _share(queued, limit), *_losses(history.rates.get(None)),
        f"{total.restarts}/{total.deaths}", sparkline(whole, max(whole, default=0.0)), style="bold",
    )  # fmt: skip
    for worker in shown:
        rates = history.rates.get(worker.slot)
        table.add_row(
            str(worker.slot), *_who(worker), *_rates(rates), _share(worker.queue_bytes, worker.queue_limit),
            *_losses(rates), f"{worker.restarts}/{worker.deaths}", sparkline(lines[worker.slot], highest),
        )  # fmt: skip
    return table


def _who(worker: Worker) -> list[Text]:
    """The process, or in what state the slot is without a reader."""
    if worker.state == "reading":
        return [Text(str(worker.pid))]
    return [Text(worker.state, style="bold red" if worker.given_up else "yellow")]


def _rates(rates: Rates | None) -> list[str]:
    if rates is None:
        return ["-"] * 5
    fill = "-" if rates.fill is None else f"{rates.fill:.0f}" if rates.fill >= 1000 else f"{rates.fill:.1f}"
    each = "-" if rates.nanoseconds is None else short(rates.nanoseconds)
    return [short(rates.datagrams), short(rates.bits / 1e6), fill, each, f"{100 * rates.busy:.0f}%"]


def _losses(rates: Rates | None) -> list[Text]:
    if rates is None:
        return [Text("-")]
    return [Text(short(rates.drops), style="bold red" if rates.drops else "")]


def _share(part: int, whole: int) -> Text:
    share = part / whole if whole else 0.0
    return Text(f"{100 * share:.0f}%", style="bold red" if share > 0.9 else "yellow" if share > 0.5 else "")


def short(number: float) -> str:
    """A number in seven characters at most: 12, 1,234, 1.23M."""
    if number < 10 and number != int(number):
        return f"{number:.2f}" if number < 1 else f"{number:.1f}"
    if number < 99_999.5:
        return f"{number:,.0f}"
    units = iter("kMGTP")
    unit = ""
    while number >= 999.5:
        number, unit = number / 1000, next(units)
    return f"{number:.3g}{unit}"


def sparkline(values: list[float], highest: float) -> str:
    """A bar a value; the least that is not 0 is still seen."""
    top = len(_BARS) - 1
    return "".join(_BARS[0 if value <= 0 else max(1, round(top * value / highest))] for value in values)
