"""A result as one self-contained HTML page: what was found, how sure it is, and what it cannot say."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastrecv.bench import drawing, letter, plots, steer_plots
from fastrecv.bench.results import Flood, Result
from fastrecv.bench.tables import blocks_of

__all__ = ["figure", "findings", "render"]

_CAPTIONS = {
    "forest": "Change of rx pps against the baseline of the same block: the dot is the median over blocks, the bar "
    "its 95 % interval. What lies within the grey band cannot be told from nothing in this run. Hollow marks are the "
    "letter's published figures, from another machine, kernel and network card.",
    "scale": "Change of rx pps against the size of the rule set. The grey band is the noise floor; a dashed line is a "
    "configuration without a rule set.",
    "windows": "Every window of every block is a dot, the line is the median. The width of a cloud is mostly the "
    "drift of the machine, which hits all configurations of a block alike.",
    "drift": "The same windows in the order of time, with a running median. Steps that all lines share do not enter "
    "the estimates, which are ratios within a block.",
    "shares": "Samples with the lookup function on the stack, as a share of all samples on the CPU under flood, taken "
    "in a pass of its own. Hollow marks are the letter's shares of cycles.",
}


def figure(result: Result) -> str:
    """The main plot as an SVG file of its own, which follows the reader's light or dark."""
    draw = {"flood": plots.forest, "scale": plots.scale, "steer": steer_plots.steer}[result.kind]
    return drawing.standalone(draw(result))


def findings(flood: Flood) -> list[str]:
    """What a flood says, a sentence a program, nothing that the intervals do not carry."""
    sentences = []
    for row in flood.configurations:
        if row.delta is None or row.name == "again":
            continue
        size = f"{drawing.signed(row.delta.estimate)}\u00a0% {drawing.bounds(row.delta)}"
        if row.verdict == "not resolved":
            sentences.append(f"{row.title}: not resolved, {size} of rx pps")
        else:
            sentences.append(f"{row.title}: {row.verdict}, {size} of rx pps")
    return sentences


def render(result: Result) -> str:
    """The page. It needs no network and no script, and prints."""
    drawn = (
        {"scale": plots.scale(result), "windows": plots.windows(result)}
        if result.kind == "scale"
        else {
            "forest": plots.forest(result),
            "windows": plots.windows(result),
            "drift": plots.drift(result),
            "shares": plots.shares(result),
        }
    )
    environment = Environment(
        loader=PackageLoader("fastrecv.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        result=result,
        theme=Markup(drawing.theme(":root")),  # noqa: S704 - our own colours
        plots=[(name, Markup(svg), _CAPTIONS[name]) for name, svg in drawn.items() if svg],  # noqa: S704 - escaped there
        series=letter.SERIES,
        letter=letter,
        findings=findings,
        blocks_of=blocks_of,
        signed=drawing.signed,
        bounds=drawing.bounds,
        shares_of=lambda flood: [row for row in flood.configurations if row.share is not None],
    )
