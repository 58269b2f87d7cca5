"""The commands on named defects: list them, explain one."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import click

from mxfp4ref.conformance.cli.shared import WIDTH, echo, goldens_option, usage_errors
from mxfp4ref.defects import DEFECTS, get_defect
from mxfp4ref.goldens import open_goldens

__all__ = ["defects", "explain"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def defects(as_json: bool) -> None:
    """List the named defects: mistakes of real code, and other arithmetics that mean the same."""
    if as_json:
        rows = [
            {n: getattr(d, n) for n in ("name", "kind", "target", "summary", "seen_in")}
            for d in DEFECTS.values()
        ]
        echo(json.dumps(rows, indent=1))
        return
    width = max(len(name) for name in DEFECTS)
    for kind, title in (("defect", "Mistakes"), ("arithmetic", "Other arithmetics")):
        echo(title, bold=True)
        for defect in DEFECTS.values():
            if defect.kind == kind:
                where = "" if defect.target == "moe" else f" [{defect.target}]"
                echo(f"  {defect.name:{width}}  {defect.summary}{where}")


@click.command()
@click.argument("defect")
@goldens_option
def explain(defect: str, root: Path | None) -> None:
    """Explain a named DEFECT: what it does, where it was seen, and which golden cases are there for it."""
    with usage_errors():
        found = get_defect(defect)
        goldens = open_goldens(root)
        catching = [name for name in goldens.names() if found.name in goldens.load(name).catches]
    echo(found.name, bold=True)
    echo(textwrap.fill(found.summary, WIDTH))
    nature = "a mistake" if found.kind == "defect" else "another arithmetic that means the same"
    echo(f"{nature}; changes: {found.target}")
    echo(f"seen in: {', '.join(found.seen_in)}")
    if catching:
        echo(textwrap.fill(f"cases made for it: {', '.join(catching)}", WIDTH, subsequent_indent="    "))
    echo(f"try it: mxfp4ref conform defect:{found.name}")
