"""The commands on named defects: list them, explain one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import goldens_option, usage_errors
from mxfp4ref.conformance.cli.terminal import echo, echo_json
from mxfp4ref.goldens import open_goldens

if TYPE_CHECKING:
    from mxfp4ref.conformance.families import Family

__all__ = ["defects", "explain"]


@command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def defects(as_json: bool) -> None:
    """List the families of wrong kernels with their named members, and the named defects of other stages.

    \b
    mxfp4ref defects
    mxfp4ref defects --json | jq -r '.[].name'

    Exit codes: 0 listed. `mxfp4ref explain` tells more of one; `mxfp4ref conform defect:NAME` runs it.
    """
    from mxfp4ref.conformance.families import FAMILIES
    from mxfp4ref.defects import DEFECTS

    if as_json:
        rows = [
            {n: getattr(d, n) for n in ("name", "kind", "target", "summary", "seen_in")}
            for d in DEFECTS.values()
        ]
        echo_json(rows)
        return
    width = max(len(name) for name in DEFECTS)
    for family in FAMILIES.values():
        echo(family.name, bold=True)
        echo(f"  {family.summary}")
        for name in family.members:
            _line(name, width)
    for target in dict.fromkeys(d.target for d in DEFECTS.values() if d.target != "moe"):
        echo(f"defects of {target}", bold=True)
        for defect in DEFECTS.values():
            if defect.target == target:
                _line(defect.name, width)


def _line(name: str, width: int) -> None:
    from mxfp4ref.defects import DEFECTS

    defect = DEFECTS[name]
    nature = "" if defect.kind == "defect" else " (another arithmetic)"
    echo(f"    {name:{width}}  {defect.summary}{nature}")


@command()
@click.argument("name", shell_complete=completing.defects)
@goldens_option
def explain(name: str, root: Path | None) -> None:
    """Explain a named defect or a family of wrong kernels, by its NAME.

    \b
    mxfp4ref explain limit_ignored
    mxfp4ref explain "K groups"

    Of a defect: what it does, where it was seen, and which golden cases are there for it. Of a family: what may
    happen, and its named members.

    Exit codes: 0 explained; 2 there is none of that name. `mxfp4ref defects` lists them.
    """
    from mxfp4ref.conformance.families import FAMILIES, family_of
    from mxfp4ref.defects import get_defect

    if name in FAMILIES:
        _explain_family(FAMILIES[name])
        return
    with usage_errors():
        found = get_defect(name)
        goldens = open_goldens(root)
        catching = [case for case in goldens.names() if found.name in goldens.load(case).catches]
    echo(found.name, bold=True)
    echo(found.summary)
    nature = "a mistake" if found.kind == "defect" else "another arithmetic that means the same"
    echo(f"{nature}; changes: {found.target}")
    if (family := family_of(found.name)) is not None:
        echo(f'family: {family.name} (mxfp4ref explain "{family.name}")')
    echo(f"seen in: {', '.join(found.seen_in)}")
    if catching:
        echo(f"cases made for it: {', '.join(catching)}")
    echo(f"try it: mxfp4ref conform defect:{found.name}")


def _explain_family(family: Family) -> None:
    echo(family.name, bold=True)
    echo(family.summary)
    echo("Such a change is tried with every parameter, and named where it predicts every bit.")
    for name in family.members:
        _line(name, max(len(member) for member in family.members))
