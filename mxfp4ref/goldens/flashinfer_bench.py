"""Golden kernel calls as a data set of flashinfer-bench: definitions, workloads and a reference.

flashinfer-bench benchmarks kernels against a data set folder; `export_flashinfer_bench` writes one without
needing that package. Its schema has no unsigned bytes, so that weights and scales are stored as int8, the same
bits. It compares with a tolerance, not bits: a kernel that passes there may still fail `mxfp4ref conform`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mxfp4ref._files import check_outside, write_tree
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.goldens.case import EXPERT_TENSORS, Case
from mxfp4ref.goldens.store import Goldens
from mxfp4ref.sm90.activation import SWIGLU

__all__ = ["export_flashinfer_bench"]

_OP_TYPE = "moe"
_TILE_K = (128, 128)  # the default tactic's

_AXES = {
    "num_tokens": "M",
    "top_k": "k",
    "num_local_experts": "E, the experts of this rank",
    "hidden_size": "H",
    "fc1_rows": "2I, the rows of up (w3) and then those of gate (w1)",
    "hidden_bytes": "H/2, two E2M1 codes a byte, the low nibble first",
    "hidden_groups": "H/32, one UE8M0 scale for each 32 elements along K",
    "intermediate_bytes": "I/2",
    "intermediate_groups": "I/32",
}
_CONSTRAINTS = [
    "hidden_bytes * 2 == hidden_size",
    "hidden_groups * 32 == hidden_size",
    "intermediate_bytes * 4 == fc1_rows",
    "intermediate_groups * 64 == fc1_rows",
    "hidden_size % 128 == 0",
    "fc1_rows % 256 == 0",
]
# Name: axes, dtype. The inputs in the order of the reference's arguments; EXPERT_TENSORS from the fifth are optional.
_TENSORS: dict[str, tuple[tuple[str, ...], str]] = {
    "input": (("num_tokens", "hidden_size"), "bfloat16"),
    "token_selected_experts": (("num_tokens", "top_k"), "int32"),
    "token_final_scales": (("num_tokens", "top_k"), "float32"),
    "fc1_weights": (("num_local_experts", "fc1_rows", "hidden_bytes"), "int8"),
    "fc1_scales": (("num_local_experts", "fc1_rows", "hidden_groups"), "int8"),
    "fc2_weights": (("num_local_experts", "hidden_size", "intermediate_bytes"), "int8"),
    "fc2_scales": (("num_local_experts", "hidden_size", "intermediate_groups"), "int8"),
    "fc1_biases": (("num_local_experts", "fc1_rows"), "bfloat16"),
    "fc2_biases": (("num_local_experts", "hidden_size"), "bfloat16"),
    **dict.fromkeys(PARAMETERS, (("num_local_experts",), "float32")),
}
_SCALARS = ("ep_size", "ep_rank", "tp_size", "tp_rank", "activation_type")
_OPTIONAL = EXPERT_TENSORS[4:]
_BYTES = EXPERT_TENSORS[:4]

_REFERENCE = '''\
import torch

from mxfp4ref import Experts, MoeCall, forward


@torch.no_grad()
def run({arguments}):
    """The bits that an H100 gives with the default tactics."""
    experts = Experts(
        fc1_weights=fc1_weights.view(torch.uint8),
        fc1_scales=fc1_scales.view(torch.uint8),
        fc2_weights=fc2_weights.view(torch.uint8),
        fc2_scales=fc2_scales.view(torch.uint8),
{given}    )
    call = MoeCall(
        input,
        token_selected_experts,
        token_final_scales,
        experts,
        ep_size=ep_size,
        ep_rank=ep_rank,
        tp_size=tp_size,
        tp_rank=tp_rank,
        strict=False,
        activation_type=activation_type,
    )
    return forward(call)
'''


def export_flashinfer_bench(goldens: Goldens, folder: Path | str) -> tuple[list[str], dict[str, str]]:
    """Write the golden cases of kind "moe" as a data set that flashinfer-bench's `TraceSet.from_path` reads.

    There is one definition for each set of optional inputs (biases, parameters of the activation) that occurs,
    with every size variable. A workload is a case; its file also has the expected `output`, of the default tactic.
    Nothing is replaced but by the same bytes, as of an earlier export; no link below the root is followed.

    Args:
        goldens: what to export.
        folder: the data set's root; created if absent.

    Returns:
        The names of the exported cases, and for the other cases of kind "moe" the reason why they were left
        out: generated weights (gigabytes), no output of the default tactic, or one that is not finite, which
        flashinfer-bench counts as an error of the kernel; an activation without a gate, or `enable_alltoall`.

    Raises:
        TypeError: `goldens` or `folder` is something else.
        GoldenError: a damaged case.
        ValueError: `folder` is inside of the goldens.
        OSError: a file cannot be written, or another one is there.
    """
    if not isinstance(goldens, Goldens):
        raise TypeError(
            f"goldens: expected Goldens, as open_goldens returns them, got {type(goldens).__name__}"
        )
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    folder = Path(folder)
    check_outside("folder", folder, goldens.root)
    workloads: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    files: dict[Path, str | bytes] = {}
    left_out: dict[str, str] = {}
    exported: list[str] = []
    for name in goldens.names():
        case = goldens.load(name)
        if case.kind != "moe":
            continue
        if case.derived:
            left_out[name] = "its weights are generated, not stored"
        elif _TILE_K not in case.output_tensors or "tile_n" in case.parameters:
            left_out[name] = "it has no output of the default tactic"
        elif not bool(case.outputs[_TILE_K].isfinite().all()):
            left_out[name] = "its output is not finite"
        elif not case.experts.gated:
            left_out[name] = "its activation has no gate"
        elif case.parameters.get("enable_alltoall"):
            left_out[name] = "not all of its output is written"
        else:
            optional = tuple(tensor for tensor in _OPTIONAL if tensor in case.tensors)
            workloads.setdefault(optional, []).append(_workload(case, optional, files))
            exported.append(name)
    for optional, traces in workloads.items():
        definition = _definition(optional)
        files[Path("definitions", _OP_TYPE, f"{definition['name']}.json")] = _json(definition, indent=2)
        lines = "".join(_json(trace) for trace in traces)
        files[Path("workloads", _OP_TYPE, f"{definition['name']}.jsonl")] = lines
    write_tree(folder, files)
    return exported, left_out


def _name(optional: tuple[str, ...]) -> str:
    return "_".join(("moe_sm90_w4a16_mxfp4", *optional))


def _definition(optional: tuple[str, ...]) -> dict[str, Any]:
    tensors = _inputs(optional)
    arguments = ", ".join((*tensors, *_SCALARS))
    given = "".join(f"        {name}={name},\n" for name in optional)
    inputs: dict[str, Any] = {name: _spec(*_TENSORS[name]) for name in tensors}
    inputs |= {name: {"shape": None, "dtype": "int32"} for name in _SCALARS}
    return {
        "name": _name(optional),
        "op_type": _OP_TYPE,
        "description": (
            "Mixture of experts with bfloat16 activations and MXFP4 weights, as flashinfer's cutlass_fused_moe "
            "computes it on SM90. Weights and scales in logical layout, bytes as int8; global expert ids, slots "
            "of other ranks are skipped."
        ),
        "tags": ["framework:flashinfer", "quantization:mxfp4", "arch:sm90"],
        "axes": {name: {"type": "var", "description": text} for name, text in _AXES.items()},
        "constraints": _CONSTRAINTS,
        "inputs": inputs,
        "outputs": {"output": _spec(("num_tokens", "hidden_size"), "bfloat16")},
        "reference": _REFERENCE.format(arguments=arguments, given=given),
    }


def _workload(case: Case, optional: tuple[str, ...], files: dict[Path, str | bytes]) -> dict[str, Any]:
    """The line that describes a case, whose tensors go into the files."""
    tensors = {name: case.tensors[name] for name in _inputs(optional)}
    tensors |= {name: tensors[name].view(torch.int8) for name in _BYTES}
    identifier = case.id.replace("/", "-")
    path = Path("blob", "workloads", _OP_TYPE, _name(optional), f"{identifier}.safetensors")
    files[path] = safetensors.torch.save({**tensors, "output": case.outputs[_TILE_K]})
    inputs: dict[str, Any] = {
        name: {"type": "safetensors", "path": path.as_posix(), "tensor_key": name} for name in tensors
    }
    scalars = {"activation_type": SWIGLU, **case.parameters}
    inputs |= {name: {"type": "scalar", "value": scalars[name]} for name in _SCALARS}
    return {
        "definition": _name(optional),
        "workload": {"uuid": identifier, "axes": _sizes(tensors), "inputs": inputs},
        "solution": None,
        "evaluation": None,
    }


def _inputs(optional: tuple[str, ...]) -> list[str]:
    return [name for name in _TENSORS if name in optional or name not in _OPTIONAL]


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        sizes.update(zip(_TENSORS[name][0], tensor.shape, strict=True))
    return sizes


def _spec(axes: tuple[str, ...], dtype: str) -> dict[str, Any]:
    return {"shape": list(axes), "dtype": dtype}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent) + "\n"
