"""`fastrecv doctor`: what this kernel and these privileges allow, and what would mend each no."""

from __future__ import annotations

import os

import click

from fastrecv import features
from fastrecv.cli import output
from fastrecv.errors import NotSupported

__all__ = ["doctor"]


@click.command()
@output.json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """What this kernel and these privileges allow, feature by feature; exit code 1 where something is missing.

    Every feature is tried for real, in a network namespace of its own where it needs one.
    """
    rows = []
    for feature in features.FEATURES.values():
        try:
            features.check(feature.name)
        except NotSupported as error:
            rows.append((feature.name, "no", feature.requires, error.reason))
        else:
            rows.append((feature.name, "yes", feature.requires, ""))
    if as_json:
        output.as_json({
            "kernel": os.uname().release,
            "features": [
                {"name": name, "works": works == "yes", "requires": requires, "mend": mend or None}
                for name, works, requires, mend in rows
            ],
        })  # fmt: skip
    else:
        click.echo(f"Linux {os.uname().release}, uid {os.geteuid()}")
        output.table(("feature", "works", "needs", "what would mend it"), rows,
                     style=lambda row: "yellow" if row[1] == "no" else "")  # fmt: skip
    context.exit(any(works == "no" for _, works, _, _ in rows))
