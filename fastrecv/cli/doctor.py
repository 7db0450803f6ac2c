"""`fastrecv doctor`: what this kernel and these privileges allow, and what would mend each no."""

from __future__ import annotations

import os

import click

from fastrecv import features
from fastrecv.cli import output
from fastrecv.errors import NotSupported

__all__ = ["MISSING", "doctor"]

MISSING = 77


@click.command()
@click.argument(
    "part",
    type=click.Choice(sorted({feature.part for feature in features.FEATURES.values()} - {"all"})),
    required=False,
)
@output.json_option
@click.pass_context
def doctor(context: click.Context, part: str | None, as_json: bool) -> None:
    """What this kernel and these privileges allow, feature by feature, and what would mend each no.

    Of one PART of fastrecv, or of all. Exit code 77 where something is missing.

    Every feature is tried for real, in a network namespace of its own where it needs one.
    """
    rows = []
    for feature in features.FEATURES.values():
        if part not in (None, feature.part) and feature.part != "all":
            continue
        try:
            features.check(feature.name)
        except NotSupported as error:
            rows.append((feature.part, feature.name, "no", feature.requires, error.reason))
        else:
            rows.append((feature.part, feature.name, "yes", feature.requires, ""))
    if as_json:
        output.as_json({
            "kernel": os.uname().release,
            "features": [
                {"part": which, "name": name, "works": works == "yes", "requires": requires, "mend": mend or None}
                for which, name, works, requires, mend in rows
            ],
        })  # fmt: skip
    else:
        click.echo(f"Linux {os.uname().release}, uid {os.geteuid()}")
        output.table(("for", "feature", "works", "needs", "what would mend it"), rows,
                     remarkable=lambda row: bool(row[2] == "no"))  # fmt: skip
    if any(row[2] == "no" for row in rows):
        context.exit(MISSING)
