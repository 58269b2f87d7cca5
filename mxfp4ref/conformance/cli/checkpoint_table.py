"""What is in a checkpoint, as a table and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from itertools import groupby
from typing import Any

from mxfp4ref._files import printable
from mxfp4ref.checkpoint.disk import ranges
from mxfp4ref.checkpoint.inspection import Counts, Inspection, LayerEntry
from mxfp4ref.conformance.cli.terminal import echo, echo_rows
from mxfp4ref.conformance.findings.finding import counted

__all__ = ["as_object", "show"]

_MANY = 0.15  # of codes at +-6: more than the eighth that they are where all codes are equally frequent
_REASONS = 20  # that are told for some layers each; more are as a rule the same one, with other names in it
_COLUMNS = ("layers", "format", "experts", "H x I", "router", "size", "unusual")


def as_object(found: Inspection) -> dict[str, Any]:
    """All that is known, for JSON."""
    return {**asdict(found), "root": str(found.root)}


def show(found: Inspection) -> None:
    """Print a table, a line for each run of equal layers, and below it why any of them would be refused."""
    total = sum(entry.bytes for entry in found.layers)
    parameters = sum(entry.parameters for entry in found.layers)
    layers = counted(len(found.layers), "layer")
    head = (
        f"{found.root}: {found.model_type or 'no model_type'}, {found.tensors:,} tensors in {found.files:,} files; "
        f"{layers} with experts of {_short(parameters, 1000)} parameters, {_short(total)}B"
    )
    _echo(head)
    runs = groupby(found.layers, key=_row)
    echo_rows(_COLUMNS, [(ranges([entry.layer for entry in some]), *row) for row, some in runs])
    carried = sorted({name for entry in found.layers for name in entry.carried})
    if carried:
        _echo(f"carried along, without effect here: {_some(carried)}")
    refused = [entry for entry in found.layers if entry.refused]
    reasons = [(reason, [*some]) for reason, some in groupby(refused, key=lambda entry: entry.refused)]
    for reason, some in reasons[:_REASONS]:
        _echo(f"refused: layer {ranges([entry.layer for entry in some])}: {reason}")
    if others := reasons[_REASONS:]:
        entries = [entry for _, some in others for entry in some]
        _echo(f"refused, too: layer {ranges([entry.layer for entry in entries])}; --json has each reason")
    if not refused:
        first = found.layers[0].layer
        line = shlex.join(
            ["mxfp4ref", "layer", "--checkpoint", str(found.root), "--layer", str(first), "--input"]
        )
        _echo(f"every layer can be run: {line} hidden.safetensors")


def _row(entry: LayerEntry) -> tuple[str, ...]:
    return (
        entry.format or "?",
        f"{entry.experts or '?'}",
        f"{entry.hidden_size} x {entry.intermediate_size}" if entry.experts else "?",
        entry.router or "?",
        f"{_short(entry.bytes)}B",
        "not read" if entry.counts is None else _unusual(entry.counts),
    )


def _unusual(counts: Counts) -> str:
    words = {
        "zero scales": counts.zero_scales,
        "NaN scales": counts.nan_scales,
        "scales that are no power of two": counts.not_powers,
        "empty groups": counts.empty_groups,
    }
    listed = [f"{count:,} {word}" for word, count in words.items() if count]
    if counts.codes and counts.saturated_codes / counts.codes > _MANY:
        listed.append(f"{100 * counts.saturated_codes / counts.codes:.1f} % of codes at +-6")
    return ", ".join(listed)


def _short(number: int, thousand: int = 1024) -> str:
    units = ("", "K", "M", "G", "T") if thousand == 1000 else (" ", " Ki", " Mi", " Gi", " Ti")
    value, unit = float(number), 0
    while value >= thousand and unit < len(units) - 1:
        value, unit = value / thousand, unit + 1
    return f"{value:.3g}{units[unit]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _echo(line: str) -> None:
    """Print a line with names of a file in it, which may have line breaks of their own."""
    echo(printable(line, lines=False))
