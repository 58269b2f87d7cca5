"""A failing case cut down to what is needed to see it fail: one token, its experts, a script of a few lines."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mxfp4ref._files import parse_json, printable, read_file, write_file
from mxfp4ref._validate import check_choice, check_instance
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.reduction import reduce_call
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import generation_named
from mxfp4ref.goldens import Case
from mxfp4ref.goldens.case import KINDS
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["load_reproducer", "write_reproducer"]

_SCRIPT = """\
{about}
#
# Runs one token of the case through a kernel and shows the first element that differs.
# Usage: python {name}.py [kernel]; see `mxfp4ref conform --help`.

import sys
from pathlib import Path

from mxfp4ref.conformance.comparison import assert_bits_equal
from mxfp4ref.conformance.execution import execute
from mxfp4ref.conformance.kernels import load_kernel
from mxfp4ref.conformance.reproducer import load_reproducer

kind, inputs, expected = load_reproducer(Path(__file__).with_suffix(".safetensors"))
kernel = load_kernel(sys.argv[1] if len(sys.argv) > 1 else {kernel!r})
outcome = execute(kernel, kind, inputs, expected)
if outcome.problem:
    sys.exit(f"{{outcome.problem}}: {{outcome.message}}")
for name, tensor in expected.items():
    assert_bits_equal(outcome.outputs[name], tensor, name)
print("equal")
"""
_CALL_FIELDS = ("input", "token_selected_experts", "token_final_scales")


def write_reproducer(folder: Path, case: Case, one: Run, kernel: str, outputs: Mapping[str, Tensor]) -> Path:
    """Write `<suite>-<case>.safetensors` and `.py` into a folder and return the script's path; no link is followed.

    Of a kernel call the first token that differs is kept, if its expected output does not depend on the other
    tokens (it may, where the first two groups of K over- or underflow), and without expert parallelism only
    the experts it uses. The kernel's own output is stored as `got.<name>`.

    Raises:
        OSError: a file cannot be written, or would replace one that is no reproducer.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{case.suite}-{case.name}")
    inputs, expected = one.inputs, dict(one.expected)
    got = {key: outputs[key] for key in expected if key in outputs}
    if isinstance(inputs, MoeCall):
        token = int(differing(got["output"], expected["output"]).any(1).nonzero()[0]) if got else 0
        reduced = reduce_call(inputs, torch.tensor([token], device=inputs.input.device))
        rows = {"output": expected["output"][token : token + 1]}
        if not bool(differing(forward(reduced), rows["output"]).any()):
            inputs, expected = reduced, rows
            got = {key: value[token : token + 1] for key, value in got.items()}
    tensors, parameters = _flatten(case.kind, inputs)
    tensors |= {f"expected.{key}": value for key, value in expected.items()}
    tensors |= {f"got.{key}": value for key, value in got.items()}
    metadata = {
        "kind": case.kind,
        "parameters": json.dumps(parameters),
        "case": printable(case.id),
        "kernel": printable(kernel),
    }
    owned = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    script = folder / f"{name}.py"
    about = "\n".join(f"# {line}" for line in printable(f"{case.id}: {case.why}").split("\n"))
    _check_ours(script)
    try:
        write_file(script.with_suffix(".safetensors"), safetensors.torch.save(owned, metadata), folder)
        write_file(script, _SCRIPT.format(about=about, name=name, kernel=kernel), folder)
    except SafetensorError as error:
        raise OSError(f"{script.with_suffix('.safetensors')}: {error}") from error
    return script


def _check_ours(script: Path) -> None:
    """Raise OSError if a file is where a reproducer goes, and is none."""
    files = [path for path in (script, script.with_suffix(".safetensors")) if path.exists()]
    if files and not (script.exists() and b"import load_reproducer" in read_file(script)):
        raise FileExistsError(errno.EEXIST, "expected a reproducer or none to write to", str(files[0]))


def load_reproducer(path: Path) -> tuple[str, Any, dict[str, Tensor]]:
    """The kind, the inputs and the expected outputs of a reproducer.

    Raises:
        ValueError: the file is none; the message names it.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        return _load(metadata["kind"], parse_json(metadata["parameters"]), tensors)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a reproducer, got {type(error).__name__}: {error}") from error


def _load(
    kind: str, parameters: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[str, Any, dict[str, Tensor]]:
    check_choice("kind", kind, KINDS)
    check_instance("parameters", parameters, dict)
    expected = {key.removeprefix("expected."): t for key, t in tensors.items() if key.startswith("expected.")}
    inputs = {key: t for key, t in tensors.items() if not key.startswith(("expected.", "got."))}
    if kind != "moe":
        return kind, {**inputs, **parameters}, expected
    experts = Experts(**{f.name: inputs.get(f.name) for f in fields(Experts)})  # type: ignore[arg-type]
    parameters["kernel"] = Sm90Kernel.of_tiles(
        tuple(parameters.pop("tile_k")),
        tuple(parameters.pop("tile_n")),
        generation_named(parameters.pop("generation")),
    )
    given: dict[str, Any] = {key: inputs[key] for key in _CALL_FIELDS}
    return kind, MoeCall(**given, experts=experts, **parameters), expected


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
