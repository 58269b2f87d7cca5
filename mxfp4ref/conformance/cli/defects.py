"""The commands on named defects: list them, explain one."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxfp4ref._words import did_you_mean
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import UsageError, goldens_option, usage_errors
from mxfp4ref.conformance.cli.terminal import echo, echo_json
from mxfp4ref.conformance.findings.finding import STAGES
from mxfp4ref.conformance.source import written_defects
from mxfp4ref.goldens import open_goldens

if TYPE_CHECKING:
    from mxfp4ref.conformance.families import Family

__all__ = ["defects", "explain"]


@command()
@click.argument("patterns", nargs=-1, metavar="[GLOB]...", shell_complete=completing.defect_globs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def defects(patterns: tuple[str, ...], as_json: bool) -> None:
    """List the families of wrong kernels with their named members, and the named defects of other stages.

    GLOB is a pattern of names, a family, a stage, or "arithmetic" for those that mean the same and round otherwise;
    without one, all are listed.

    \b
    mxfp4ref defects
    mxfp4ref defects 'limit*' 'K groups' routing
    mxfp4ref defects --json | jq -r '.[].name'

    Exit codes: 0 listed; 2 nothing matches. `mxfp4ref explain` tells more of one; `mxfp4ref conform defect:NAME` runs
    it.
    """
    from mxfp4ref.conformance.families import FAMILIES

    known, chosen = written_defects(), _chosen(patterns)
    if as_json:
        fields = ("name", "kind", "target", "summary", "seen_in")
        echo_json([{n: getattr(known[name], n) for n in fields} for name in chosen])
        return
    width = max(map(len, chosen), default=0)
    for family in FAMILIES.values():
        members = [name for name in family.members if name in chosen]
        if members or not patterns or family.name in patterns:
            echo(family.name, bold=True)
            echo(f"  {family.summary}")
            _list(members, width)
    for target in dict.fromkeys(known[name].target for name in chosen if known[name].target != "moe"):
        echo(f"defects of {target}", bold=True)
        _list([name for name in chosen if known[name].target == target], width)


def _chosen(patterns: Sequence[str]) -> list[str]:
    """The defects that any of the patterns means; all without one."""
    from mxfp4ref.conformance.families import FAMILIES, family_of
    from mxfp4ref.conformance.families.named_stages import stages_of

    known = written_defects()
    words: dict[str, set[str]] = {}  # what a pattern may mean besides the names
    for name, defect in known.items():
        family = family_of(name)
        kinds = {"arithmetic"} & {defect.kind}
        words[name] = {defect.target, *stages_of(name), *kinds} | ({family.name} if family else set())
    chosen: set[str] = set()
    for pattern in patterns:
        found = {n for n in known if pattern in words[n] or fnmatch.fnmatchcase(n, pattern)}
        if not found and pattern not in FAMILIES:
            hint = did_you_mean(pattern, [*known, *FAMILIES, *STAGES])
            raise UsageError(f"GLOB: {pattern!r} matches none of the {len(known)} defects{hint}")
        chosen |= found
    return [name for name in known if not patterns or name in chosen]


def _list(names: Sequence[str], width: int = 0) -> None:
    """Defects, a line each; the summaries begin below each other, after the longest name or further right."""
    width = max([width, *map(len, names)])
    for defect in map(written_defects().__getitem__, names):
        nature = "" if defect.kind == "defect" else " (another arithmetic)"
        echo(f"    {defect.name:{width}}  {defect.summary}{nature}")


@command()
@click.argument("words", metavar="NAME", nargs=-1, required=True, shell_complete=completing.explained)
@goldens_option
def explain(words: tuple[str, ...], root: Path | None) -> None:
    """Explain a named defect, a family of wrong kernels or a stage, by its NAME.

    \b
    mxfp4ref explain limit_ignored
    mxfp4ref explain "K groups"
    mxfp4ref explain slots

    Of a defect: what it does, where it was seen, and which golden cases are there for it. Of a family: what may
    happen, and its named members. Of a stage, which reports have in brackets: what it does, and the named defects
    that lie in it.

    Exit codes: 0 explained; 2 there is none of that name. `mxfp4ref defects` lists them.
    """
    from mxfp4ref.conformance.families import FAMILIES, family_of

    known = written_defects()
    name = " ".join(words)  # families have names of several words, which a shell completes without quotes
    if name in STAGES:
        _explain_stage(name)
    if name in FAMILIES:
        _explain_family(FAMILIES[name])
    if name in STAGES or name in FAMILIES:
        return
    if name not in known:
        if hint := did_you_mean(name, [*known, *FAMILIES, *STAGES]):
            raise UsageError(f"NAME: there is no defect, family or stage {name!r}{hint}")
        raise UsageError(
            f"NAME: expected one of the {len(known)} defects, a family ({', '.join(FAMILIES)}) or a stage "
            f"({', '.join(STAGES)}); got {name!r}"
        )
    found = known[name]
    with usage_errors():
        goldens = open_goldens(root)
        catching = [case for case in goldens.names() if name in goldens.about(case)["catches"]]
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


_STAGES = {
    "input": "the activations that the kernel is given, by token",
    "slots": "which expert computes which row: ids, ranks and padding",
    "fc1": "GEMM1, from the input and the fc1 weights and scales to its bf16 rows: up and gate, or one value",
    "activation": "the activation, with fc1 biases and its parameters such as alpha, beta and limit",
    "fc2": "GEMM2, from the activation and the fc2 weights and scales to a bf16 row for each slot",
    "finalize": "the sum of a token's rows, each with its fc2 bias and times its routing weight",
    "routing": "the router, from logits to ids and weights",
    "quantize": "values to MXFP4 codes and scales",
    "dequantize": "MXFP4 codes and scales to values",
    "layout": "the order of the bytes of weights and scales",
}


def _explain_stage(name: str) -> None:
    from mxfp4ref.conformance.families.named_stages import stages_of

    echo(f"stage {name}", bold=True)
    echo(f"What is in it: {_STAGES[name]}.")
    members = [defect for defect in written_defects() if name in stages_of(defect)]
    echo("Named defects that lie in it, or may:" if members else "No named defect lies in it.")
    _list(members)


def _explain_family(family: Family) -> None:
    echo(f"family {family.name}", bold=True)
    echo(f"Its changes: {family.summary}.")
    echo("Such a change is tried with every parameter, and named where it predicts every bit.")
    _list(family.members)
