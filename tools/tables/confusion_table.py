"""Every named defect as the kernel under test: what does the diagnosis call it, and does mode "bounded" see it?

    python tools/tables/confusion_table.py            # write docs/confusion.md; exit code 1 if one is not named
    python tools/tables/confusion_table.py --check    # compare with the stored table instead

The naming is that of `mxfp4ref.conformance`: a defect is named when it predicts every bit of every case that
fails and leaves the cases that pass as they are. All defects are run on each case once and the outputs compared
with each other, which is what as many conformance runs would do one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mxfp4ref._files import write_file
from mxfp4ref.conformance.bounds.call_bounds import STORAGE, bound
from mxfp4ref.conformance.bounds.router_bounds import routing_outside
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.agreement import name_defects
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import open_goldens, tensor_bytes
from mxfp4ref.goldens.runs import runs

HELD_OUT = Path(__file__).with_name("held_out.json")  # written by `held_out.py --store`
STORED = Path(__file__).resolve().parents[2] / "docs" / "confusion.md"
CONFIDENCE = 1 - 1e-9
MOST_TOKENS = 64
EXPECTED = ""  # the name of the right output among the defects' outputs


@dataclass(frozen=True)
class Column:
    """A case: for each defect that runs on it what identifies its output, and in which bounds it escapes."""

    case: str
    target: str
    outputs: dict[str, str]
    escapes: dict[str, frozenset[str]]


def column(name: str) -> Column | None:
    """Run every defect on a case; None for cases that are too large or that no defect changes."""
    torch.set_num_threads(1)
    case = open_goldens().load(name)
    targets = {defect.target for defect in DEFECTS.values()}
    if (
        case.kind not in targets
        or case.is_whole_layer
        or case.parameters.get("dtype", "bfloat16") != "bfloat16"
    ):
        return None
    if case.kind == "moe" and (len(case.tensors["input"]) > MOST_TOKENS or "tile_n" in case.parameters):
        return None
    one = runs(case)[0]
    outputs = {EXPECTED: _identity(one.expected)}
    escapes: dict[str, frozenset[str]] = {}
    bounds = {}
    if case.kind == "moe":
        bounds = {storage: bound(one.inputs, storage=storage) for storage in STORAGE}
        bounds["probable"] = bound(one.inputs, confidence=CONFIDENCE)
    for defect in DEFECTS.values():
        if defect.target != case.kind:
            continue
        got = defect_outputs(defect, one.inputs)
        got = dict(one.expected) if got is None else got
        outputs[defect.name] = _identity(got)
        if case.kind == "moe" and bool(differing(got["output"], one.expected["output"]).any()):
            both = got["output"], one.expected["output"]
            found = (kind for kind, b in bounds.items() if not bool(b.contains(*both).all()))
            escapes[defect.name] = frozenset(found)
        if case.kind == "routing" and routing_outside(one.inputs, got):
            escapes[defect.name] = frozenset({"wider"})
    return Column(name, case.kind, outputs, escapes)


def names_of(defect: str, columns: list[Column]) -> tuple[int, tuple[str, ...]]:
    """How many cases fail with the defect as the kernel, and what the diagnosis names."""
    ran = [c for c in columns if defect in c.outputs]
    failing = [c for c in ran if c.outputs[defect] != c.outputs[EXPECTED]]
    exact = [[n for n, out in c.outputs.items() if n and out == c.outputs[defect]] for c in failing]
    named = name_defects(exact)
    for c in ran:
        if c not in failing:
            named = tuple(n for n in named if c.outputs.get(n, c.outputs[EXPECTED]) == c.outputs[EXPECTED])
    return len(failing), named


def table(columns: list[Column]) -> tuple[str, list[str]]:
    """The table as Markdown, and the defects that are not named as they should be."""
    lines, problems = [], []
    caught = dict.fromkeys((*STORAGE, "probable"), 0)
    total = 0
    for name, defect in DEFECTS.items():
        failing, named = names_of(name, columns)
        if named != (name,):
            problems.append(f"{name}: {failing} cases fail, named {', '.join(named) or 'nothing'}")
        counts = {kind: sum(kind in c.escapes.get(name, ()) for c in columns) for kind in caught}
        bounded = {"moe": tuple(caught), "routing": ("wider",)}.get(defect.target, ())
        cells = [str(counts[kind]) if kind in bounded else "" for kind in caught]
        if defect.target == "moe":
            total += 1
            caught = {kind: caught[kind] + (counts[kind] > 0) for kind in caught}
        words = "itself" if named == (name,) else ", ".join(named) or "nothing"
        lines.append(f"| {name} | {defect.kind} | {failing} | {words} | {' | '.join(cells)} |")
    mistakes = [d.name for d in DEFECTS.values() if d.target == "moe" and d.kind == "defect"]
    missed = [n for n in mistakes if not any("wider" in c.escapes.get(n, ()) for c in columns)]
    seen = ", ".join(
        f"{caught[kind]} in {word}" for kind, word in zip(caught, ("wider", "bf16", "probable"), strict=True)
    )
    summary = textwrap.fill(
        f"Of the {total} defects of the layer itself the intervals catch {seen}. A pipeline that only sums or "
        "rounds in another permitted way is a correct evaluation and has to lie inside, but for "
        "NaN, which is accepted only where the kernel gives NaN, and scale byte 255. Mistakes that mode `bounded` "
        f"cannot see at all, because what they make is within its freedom: {', '.join(missed) or 'none'}.",
        110,
    )
    head = f"""# Which defect is taken for which

Written by `tools/tables/confusion_table.py`. Each of the {len(DEFECTS)} named defects was the kernel under test on
the {len(columns)} golden cases that defects run on (whole-size layers and single stages left out).

- *fails*: cases whose bits differ in mode `exact`.
- *named*: the defects that the diagnosis names: those that predict every bit of every failing case and leave the
  passing ones alone. `itself` is the right answer.
- *wider*, *bf16*, *probable*: cases in which some element lies outside its interval, that is, which mode `bounded`
  fails too: the rigorous interval for kernels that may keep wider intermediates (what `conform --mode bounded`
  uses), the one for kernels that round to bf16 between the stages, and the probabilistic one with confidence
  1 - 10^-9. Routers have one kind of bounds, in which ties may be broken either way.

{summary}

| kernel under test | kind | fails | named | wider | bf16 | probable |
|---|---|---:|---|---:|---:|---:|
"""
    return head + "\n".join(lines) + "\n" + held_out(), problems


def held_out() -> str:
    """What was said of wrong kernels that are on no list, as it was last measured."""
    if not HELD_OUT.is_file():
        return ""
    lines = []
    for place, found in json.loads(HELD_OUT.read_text(encoding="utf-8")).items():
        parts = " | ".join(f"{found[name]:.0%}" for name in ("detected", "stage right", "described"))
        where = place.replace("suite", "over the goldens").replace("single", "one captured call each")
        which = f" ({', '.join(found['which'])})" if found["which"] else ""
        lines.append(f"| {where} | {found['kernels']} | {parts} | {found['misleading']:.0f}{which} |")
    head = """
## Kernels that are on no list

`tools/tables/held_out.py` ran those of `tests/held_out_kernels/` and judged what was said of each: whether the stage
is right, whether the sentence tells the mistake, and whether anything false was said. *At first sight* are
kernels by people who had not read the diagnosis, of the kinds of mistakes that are known and some that are not,
judged before anything was mended by them; it has been since, so that they would do better now.

| where | kernels | detected | stage right | described | misleading |
|---|---:|---:|---:|---:|---:|
"""
    return head + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored table, write nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        columns = [c for c in pool.map(column, open_goldens().names()) if c is not None]
    text, problems = table(columns)
    print(text)
    for problem in problems:
        print(problem, file=sys.stderr)
    if arguments.check:
        if not STORED.is_file() or STORED.read_text(encoding="utf-8") != text:
            problems.append("out of date")
            print(f"{STORED.name} is not what would be written", file=sys.stderr)
    else:
        STORED.parent.mkdir(exist_ok=True)
        write_file(STORED, text)
    return 1 if problems else 0


def _identity(outputs: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(outputs):
        digest.update(tensor_bytes(outputs[name]))
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
