"""A failing case in two files: its tensors, as few as it was seen to fail with, and a script of a few lines."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mxfp4ref._files import name_in_utf8, parse_json, printable, read_file, write_file
from mxfp4ref._validate import check_choice, check_instance
from mxfp4ref._version import __version__
from mxfp4ref.conformance.bounds.bounded import outside_bounds
from mxfp4ref.conformance.comparison import differing, in_words
from mxfp4ref.conformance.isolation.execution import execute
from mxfp4ref.conformance.kernels.loading import load_kernel
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import generation_named
from mxfp4ref.goldens import Case
from mxfp4ref.goldens.runs import Run
from mxfp4ref.goldens.store import KINDS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["load_reproducer", "reproduce", "write_reproducer"]

_SCRIPT = """\
{about}
#
# Runs the case through a kernel and says what differs. A call of the whole layer is cut down to the first token that
# differs, or to that one and those before it, where the kernel was seen to fail on these alone.
# Needs mxfp4ref {version}, {name}.safetensors beside this file, and the kernel, if no other is given:
#
#     python {name}.py [KERNEL [DEVICE]]     as for `mxfp4ref conform`
#
# Exit codes: 0 nothing differs: the mistake does not show; 1 something does, or the kernel fails; 2 it could not run.

import sys
from pathlib import Path

try:
    from mxfp4ref.conformance.reports.reproducer import reproduce
except ImportError as error:
    print(f"{{error}}; expected mxfp4ref to be installed: pip install mxfp4ref=={version}", file=sys.stderr)
    sys.exit(2)

{path}kernel = sys.argv[1] if sys.argv[1:] else {kernel!r}
device = sys.argv[2] if sys.argv[2:] else {device!r}
# To look at the tensors: kind, inputs, expected = mxfp4ref.conformance.reports.reproducer.load_reproducer(path)
sys.exit(reproduce(Path(__file__).with_suffix(".safetensors"), kernel, device))
"""
_CALL_FIELDS = ("input", "token_selected_experts", "token_final_scales")


def write_reproducer(
    folder: Path,
    case: Case,
    one: Run,
    kernel: str,
    outputs: Mapping[str, Tensor],
    device: str = "cpu",
    bounds: tuple[str, float | None] | None = None,
) -> Path:
    """Write `<suite>-<case>.safetensors` and `.py` into a folder and return the script's path; no link is followed.

    The kernel's own output is stored as `got.<name>`. The script runs in any working directory, and after both files
    were moved.

    Args:
        folder: where; it is made.
        case, one: what was run, or a part of it that fails likewise.
        kernel: its name.
        outputs: what it gave.
        device: where its tensors go.
        bounds: in mode bounded, storage and confidence as in `bounds.bound`.

    Raises:
        OSError: a file cannot be written, or would replace one that is no reproducer.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{case.suite}-{case.name}")
    inputs, expected = one.inputs, one.expected
    got = {key: outputs[key] for key in expected if key in outputs}
    tensors, parameters = _flatten(case.kind, inputs)
    tensors |= {f"expected.{key}": value for key, value in expected.items()}
    tensors |= {f"got.{key}": value for key, value in got.items()}
    metadata = {
        "kind": case.kind,
        "parameters": json.dumps(parameters),
        "case": printable(case.id),
        "kernel": printable(kernel),
        "bounds": json.dumps(bounds),
        "first_token": str(one.first_token),
    }
    owned = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    script = folder / f"{name}.py"
    about = "\n".join(f"# {line}" for line in printable(f"{case.id}: {case.why}").split("\n"))
    found, places = _from_anywhere(kernel)
    names = {"kernel": found, "device": device, "version": __version__, "name": name, "about": about}
    text = _SCRIPT.format(**names, path=f"sys.path += {places!r}  # the kernel is there\n" if places else "")
    _check_ours(script)
    try:
        write_file(script, text, folder)  # first: by it what an interruption leaves is known as a reproducer
        write_file(script.with_suffix(".safetensors"), safetensors.torch.save(owned, metadata), folder)
    except SafetensorError as error:
        raise OSError(f"{script.with_suffix('.safetensors')}: {error}") from error
    return script


def _check_ours(script: Path) -> None:
    """Raise OSError if a file is where a reproducer goes, and is none."""
    files = [path for path in (script, script.with_suffix(".safetensors")) if path.exists()]
    if files and not (
        script.exists() and b"mxfp4ref.conformance.reports.reproducer import" in read_file(script)
    ):
        raise FileExistsError(errno.EEXIST, "expected a reproducer or none to write to", str(files[0]))


def _from_anywhere(kernel: str) -> tuple[str, list[str]]:
    """A kernel's name that leads to it from any working directory, and where its module is looked for."""
    before, _, function = kernel.rpartition(":")
    *head, module = before.split(":")
    if module.endswith(".py"):
        return ":".join((*head, str(Path(module).absolute()), function)), []
    top = module.partition(".")[0]
    if top.isidentifier():
        installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
        for place in [*sys.path, os.getcwd()]:
            if PathFinder.find_spec(top, [place]) is not None:
                return kernel, [] if place in installed else [os.path.abspath(place)]
    return kernel, []


def load_reproducer(path: Path) -> tuple[str, Any, dict[str, Tensor]]:
    """The kind, the inputs and the expected outputs of a reproducer.

    Raises:
        ValueError: the file is none; the message names it.
    """
    one, _ = _read(path)
    return one.kind, one.inputs, one.expected


def reproduce(path: Path, kernel: str, device: str | None = None) -> int:
    """Run a kernel on a reproducer, and print what differs.

    Args:
        path: its safetensors file.
        kernel, device: as for `load_kernel`.

    Returns:
        0 where nothing differs, 1 where something does or the kernel fails, 2 where it could not be run.
    """
    try:
        one, metadata = _read(path)
        loaded = load_kernel(kernel, device)
        bounds = parse_json(metadata.get("bounds", "null"))
    except ValueError as error:
        print(
            f"{printable(str(error))}\nAnother kernel or device: python {path.stem}.py KERNEL DEVICE",
            file=sys.stderr,
        )
        return 2
    print(printable(f"{metadata.get('case')}: {kernel} on {loaded.device}"))
    outcome = execute(loaded, one.kind, one.inputs, one.expected)
    if outcome.problem:
        print(printable(f"{outcome.problem}: {outcome.message}"))
        return 2 if outcome.problem == "skipped" else 1
    wrong = False
    for name, want in one.expected.items():
        got = outcome.outputs[name].cpu()
        print(f"{name}: {in_words(got, want)}")
        if (first := metadata.get("first_token", "0")) != "0":
            print(printable(f"    [0, 0] here is [{first}, 0] of the whole call"))
        wrong |= bool(differing(got, want).any())
        if name in one.got:
            same = not bool(differing(got, one.got[name]).any())
            print(f"    {'the same bits' if same else 'other bits than those'} that were recorded")
    if wrong and bounds is not None:
        run = Run("", one.inputs, one.expected)
        outside, _ = outside_bounds(
            one.kind, run, {name: t.cpu() for name, t in outcome.outputs.items()}, *bounds
        )
        if outside is not None:
            print(f"{outside:,} elements lie outside the bounds of correct evaluations")
            wrong = outside > 0
    if outcome.message and not wrong:
        print(printable(f"wrong output: {outcome.message}"))
        return 1
    if not wrong:
        print("The mistake does not show here: this kernel passes the case as it is stored.")
    return int(wrong)


@dataclass(frozen=True)
class _Reproducer:
    """What is in the safetensors file."""

    kind: str
    inputs: Any
    expected: dict[str, Tensor]
    got: dict[str, Tensor]


def _read(path: Path) -> tuple[_Reproducer, Mapping[str, str]]:
    try:
        with name_in_utf8(path) as name, safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        return _load(metadata["kind"], parse_json(metadata["parameters"]), tensors), metadata
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a reproducer, got {type(error).__name__}: {error}") from error


def _load(kind: str, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> _Reproducer:
    check_choice("kind", kind, KINDS)
    check_instance("parameters", parameters, dict)
    expected, got = (
        {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        for start in ("expected.", "got.")
    )
    inputs = {key: t for key, t in tensors.items() if not key.startswith(("expected.", "got."))}
    if kind != "moe":
        return _Reproducer(kind, {**inputs, **parameters}, expected, got)
    experts = Experts(**{f.name: inputs.get(f.name) for f in fields(Experts)})  # type: ignore[arg-type]
    parameters["kernel"] = Sm90Kernel.of_tiles(
        tuple(parameters.pop("tile_k")),
        tuple(parameters.pop("tile_n")),
        generation_named(parameters.pop("generation")),
    )
    given: dict[str, Any] = {key: inputs[key] for key in _CALL_FIELDS}
    return _Reproducer(kind, MoeCall(**given, experts=experts, **parameters), expected, got)


def _flatten(kind: str, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if kind == "moe":
        names = (f.name for f in fields(MoeCall) if f.name not in (*_CALL_FIELDS, "experts", "kernel"))
        parameters = {name: getattr(inputs, name) for name in names}
        kernel = inputs.kernel
        parameters |= {"tile_k": kernel.tile_k, "tile_n": kernel.tile_n, "generation": kernel.generation.name}
        tensors = {name: getattr(inputs, name) for name in _CALL_FIELDS}
        tensors |= {f.name: t for f in fields(Experts) if (t := getattr(inputs.experts, f.name)) is not None}
        return tensors, parameters
    return (
        {key: value for key, value in inputs.items() if isinstance(value, Tensor)},
        {key: value for key, value in inputs.items() if not isinstance(value, Tensor)},
    )
