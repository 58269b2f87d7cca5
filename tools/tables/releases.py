"""Writes docs/releases.md: which release of flashinfer is modelled how, and what that rests on.

All of it is read: from `mxfp4ref.formats.generations` and the table of activations, from `goldens/hardware/` and the
goldens' sidecars, and from `tests/recordings/`. Where nothing was recorded the page says so.

    python tools/tables/releases.py            # --check compares only
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from mxfp4ref._files import write_file
from mxfp4ref.formats.generations import BYTEWISE, PLAIN, WORDWISE
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "releases.md"
GOLDENS = ROOT / "goldens"
RECORDINGS = ROOT / "tests" / "recordings"
GENERATIONS = (PLAIN, BYTEWISE, WORDWISE)
KINDS = (*(activation.name for activation in ACTIVATIONS.values()), "W4A8", "W4A8 in fp16")
HOW = ("golden calls", "random calls", "random calls of real size", "other calls")
TEXT = """# Releases

Which release of flashinfer-python is modelled how, and what that rests on. `tools/tables/releases.py` writes this
page from the records in the code and in `goldens/hardware`; a test holds that it is what the tool writes.

## Which kernel a release has

A release has the kernel whose mixture-of-experts mainloop it has, compared byte by byte in the sources. One that is
not here is refused. The kernels differ in where weights and scales lie, in the order of the groups of K and in what
they do with the first two ([the arithmetic](arithmetic.md)).

{kernels}

What is known to be wrong with a kernel on hardware, and is not modelled:

{faults}

## What was compared with hardware

Elements of outputs that a GPU and this package computed for the same calls, and how many of them differ. Other
calls are those designed for a question, one call by every tactic, and large calls repeated. What is known of those
that differ is above. They are {differing}.

{compared}

Nothing was recorded of

{gaps}

The package computes these as it computes what was compared; whether a release that is older than the recorded one has
them is not recorded either. Single instructions and tensor-core steps are in the table of all records,
`goldens/hardware/README.md`.
"""


class Record(NamedTuple):
    """One comparison of whole calls; `kind` is one of KINDS, or several that were mixed."""

    release: str
    gpu: str
    kind: str
    how: str
    elements: int
    differing: int


def records() -> Iterator[Record]:
    """All that goldens/hardware has of whole calls."""
    for path in sorted((GOLDENS / "hardware").glob("*.jsonl")):
        how = HOW[3] if path.stem.endswith("-tactics") else HOW[0]
        for run in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            parameters = _read(GOLDENS / f"{run['case']}.json")["parameters"]
            kind = ACTIVATIONS[parameters.get("activation_type", SWIGLU)].name
            yield Record(run["flashinfer"], run["gpu"], kind, how, run["elements"], run["differing"])
    for path in sorted((GOLDENS / "hardware").glob("*.json")):
        run = _read(path)
        machine = run["provenance"]["flashinfer"], run["provenance"]["gpu"]
        # Records without a kind are from when SwiGLU was the only one.
        kind = run.get("path") or ", ".join(run.get("activations", [ACTIVATIONS[SWIGLU].name]))
        if "seeds" in run:
            how = HOW[2] if run.get("real_size") else HOW[1]
            yield Record(*machine, kind, how, run["elements"], run["differing"])
        for name, counts in run.items():
            if isinstance(counts, dict) and "runs" in counts:
                how = HOW[0] if f"{name.rpartition(' ')[2]}.json" in _GOLDEN_FILES else HOW[3]
                yield Record(*machine, kind, how, counts["compared"], counts["differing"])


def page() -> str:
    found = list(records())
    sums: dict[tuple[str, str, str], dict[str, list[int]]] = defaultdict(dict)
    for record in found:
        total = sums[record[:3]].setdefault(record.how, [0, 0])
        total[0], total[1] = total[0] + record.elements, total[1] + record.differing
    order = {kind: number for number, kind in enumerate(KINDS)}
    rows = sorted(sums, key=lambda key: (_number(key[0]), key[1], order[key[2].split(", ")[0]], key[2]))
    compared = ([*key, *(_counts(sums[key].get(how)) for how in HOW)] for key in rows)
    differing = sorted({f"{r.release}'s {r.how}" for r in found if r.differing}) or ["none"]
    return TEXT.format(
        kernels=_table(("flashinfer-python", "kernel", "`profile_ids`", "run on hardware"), _kernels(found)),
        faults="\n".join(f"- {g.name}: {fault}." for g in GENERATIONS for fault in g.known_faults),
        differing=", ".join(differing),
        compared=_table(("flashinfer-python", "GPU", "kind", *HOW), compared),
        gaps="\n".join(_gaps(found)),
    )


def _kernels(found: Sequence[Record]) -> Iterator[Sequence[str]]:
    """The releases of each kernel, those that were run one by one, the others together."""
    compared, kept = {record.release for record in found}, _kept_outputs()
    for generation in GENERATIONS:
        tactics = "force the tactic" if generation.forces_tactics else "without effect"
        untouched = [r for r in generation.releases if r not in compared and r not in kept]
        yield ", ".join(untouched), generation.name, tactics, "nothing recorded: by its source alone"
        for release in generation.releases:
            if release not in untouched:
                said = ["compared, below"] if release in compared else []
                yield release, generation.name, tactics, "; ".join(said + kept.get(release, []))


@functools.cache
def _kept_outputs() -> dict[str, list[str]]:
    """Outputs of a release's kernel that the tests hold this package against, beside the goldens."""
    kept: dict[str, list[str]] = defaultdict(list)
    for path in RECORDINGS.glob("flashinfer_*.npz"):
        with np.load(path) as calls:
            release = path.stem.removeprefix("flashinfer_").replace("_", ".")
            elements = sum(calls[name].size for name in calls.files)
            kept[release].append(f"{len(calls.files)} random calls kept, {elements:,} elements")
    with tarfile.open(RECORDINGS / "server_calls.tar.xz") as archive:
        outputs = [name.split("/")[0] for name in archive.getnames() if name.endswith("outputs.safetensors")]
    for release in sorted(set(outputs)):
        number = outputs.count(release)
        kept[release].append(f"{number} {'call' if number == 1 else 'calls'} of flashinfer's recorder kept")
    return kept


def _gaps(found: Sequence[Record]) -> Iterator[str]:
    kept = _kept_outputs()
    for generation in GENERATIONS:
        seen = {kind for r in found if r.release in generation.releases for kind in r.kind.split(", ")}
        if kept.keys() & set(generation.releases):
            seen.add(ACTIVATIONS[SWIGLU].name)
        if missing := [kind for kind in KINDS if kind not in seen]:
            yield f"- {', '.join(missing)} on the {generation.name} kernel;"
    pending = [case for case, sidecar in _GOLDEN_FILES.items() if sidecar.get("pending")]
    yield "- golden calls that wait for a GPU: " + (
        ", ".join(f"`{case.removesuffix('.json')}`" for case in pending) + "." if pending else "none."
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _counts(total: Sequence[int] | None) -> str:
    return f"{total[0]:,}, {total[1]:,} differing" if total else "nothing recorded"


def _number(release: str) -> list[int]:
    return [int(part.removeprefix("post")) for part in release.split(".")]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(list(header)), *rows))


_GOLDEN_FILES = {
    path.relative_to(GOLDENS).as_posix(): _read(path)
    for path in sorted(GOLDENS.glob("*/*.json"))
    if path.parent.name != "hardware"
}


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option(
    "--check", is_flag=True, help="Write nothing; exit with 1 where the page is not what would be written."
)
def main(check: bool) -> None:
    text = page()
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    where = PAGE.relative_to(ROOT)
    if check and not same:
        raise click.ClickException(f"{where} is not what python tools/tables/releases.py writes")
    if not same:
        write_file(PAGE, text)
    click.echo(f"{where}: {'as it was' if same else 'written'}, {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
