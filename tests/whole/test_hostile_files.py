"""Files that are damaged, foreign or hostile, before every command that reads them.

Each is said in a line, with the right exit code: 2 where something cannot be read, 1 where it is not what it should
be, 0 where it does not matter. Nothing is waited for, no other file is written, and no file commands the terminal.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import file_fuzz, hostile_gguf
from tests.helpers.hostile_files import (
    CALL,
    COMMANDS,
    DEEP,
    FLUSH,
    INDEX,
    LAYOUT,
    MANIFEST,
    MOE,
    PICKLE,
    RECORD,
    ROUTING,
    SHARD,
    WRITES,
    Spoil,
    both,
    contents,
    directory,
    edit,
    fifo,
    forge,
    forge_tensors,
    link,
    make_folder,
    one_tensor,
    run,
    sparse,
    tensor_file,
    tensors,
    without,
    write,
)
from tools.hardware import recorded

ESCAPE = "\x1b]0;title\x07\x1b[2J"
SHOWN = r"\\x1b\]0;title\\x07\\x1b\[2J"
READ_GOLDENS = ("verify", "show", "explain", "conform", "export", "regenerate")
BF16 = torch.ones(3, 96, dtype=torch.bfloat16)

# What the file is: how it is made, what has to be said, the exit code of each command.
HOSTILE: dict[str, tuple[Spoil, str, dict[str, int]]] = {}


def hostile(name: str, spoil: Spoil, says: str, *commands: str, code: int = 2, **codes: int) -> None:
    assert name not in HOSTILE
    named = {command.replace("_", " "): other for command, other in codes.items()}
    HOSTILE[name] = (spoil, says, dict.fromkeys(commands, code) | named)


# Manifests.
for name, data, says in (
    ("empty", "", "not JSON"),
    ("nested deeply", DEEP, "not JSON: nested too deeply"),
    (
        "nested deeply inside",
        '{"format": "mxfp4ref-goldens-1", "cases": ' + DEEP,
        "not JSON: nested too deeply",
    ),
    ("no UTF-8", b"\x80\xff\x00\x01", r"not JSON: .*(decode|codec)"),
    ("a list", "[]", "expected a JSON object, got list"),
    (
        "another project's",
        '{"format": "snapshots-3", "cases": []}',
        "expected 'mxfp4ref-goldens-1', got 'snapshots-3'",
    ),
    (
        "a format that commands",
        json.dumps({"format": ESCAPE}),
        "got .*x1b",
    ),
    ("a key twice", '{"format": "x", "format": "mxfp4ref-goldens-1"}', "the key 'format' is there twice"),
    ("a lone surrogate", '{"format": "\\ud800"}', r"got '\\ud800'"),
    ("a number of 5,000 digits", '{"format": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
):
    hostile(f"manifest: {name}", write(MANIFEST, data), rf"manifest\.json: .*{says}", *READ_GOLDENS)
hostile("manifest: a pipe", fifo(MANIFEST), "cannot be read: expected a regular file", *READ_GOLDENS)
hostile("manifest: a terabyte", sparse(MANIFEST), "expected at most 1,073,741,824 bytes", *READ_GOLDENS)
hostile("record: a terabyte", sparse(RECORD), "expected at most 1,073,741,824 bytes", "verify files")
hostile(
    "config: a terabyte", sparse("checkpoint/config.json"), "expected at most 1,073,741,824 bytes", "layer"
)
hostile("shard: a terabyte", sparse(SHARD), "cannot be read", "layer")
hostile("input: a terabyte", sparse("hidden.safetensors"), "expected a safetensors file", "layer")
hostile("compared: a terabyte", sparse("b.safetensors"), "expected a safetensors file", "compare")
hostile(
    "sidecar: a terabyte",
    sparse(f"goldens/{MOE}.json"),
    "expected at most 1,073,741,824",
    "show",
    "conform",
    verify=1,
)
hostile("manifest: a folder", directory(MANIFEST), "cannot be read: expected a regular file", *READ_GOLDENS)
hostile(
    "manifest: a device without end", link(MANIFEST, "/dev/zero"), "expected a regular file", *READ_GOLDENS
)
hostile(
    "manifest: a link to itself",
    link(MANIFEST, "manifest.json"),
    "cannot be read: Too many levels",
    *READ_GOLDENS,
)
hostile("manifest: gone", lambda f: (f / MANIFEST).unlink(), "cannot be read: No such file", *READ_GOLDENS)
for name, key in (
    ("out of the root", "../../etc/passwd"),
    ("absolute", "/etc/passwd"),
    ("a command", ESCAPE + "a/b"),
):
    hostile(
        f"manifest: a name {name}",
        edit(MANIFEST, lambda m, key=key: m["cases"].update({key: m["cases"][MOE]})),
        "expected names of cases as suite/case, got .*(etc|x1b)",
        *READ_GOLDENS,
    )
for name, entry in (
    ("bytes that are true", {"bytes": True, "sha256": ""}),
    ("bytes that are NaN", {"bytes": float("nan"), "sha256": ""}),
    ("a hash that is a list", {"bytes": 1, "sha256": [[]]}),
    ("no hash", {"bytes": 1}),
):
    hostile(
        f"manifest: {name}",
        edit(MANIFEST, lambda m, entry=entry: m["cases"][MOE].update(json=entry)),
        r"manifest\.cases\.finalize/slot_order\.json.*: expected",
        *READ_GOLDENS,
    )
hostile(
    "manifest: no cases",
    edit(MANIFEST, lambda m: m.update(cases={})),
    "without a case",
    "show",
    "conform",
    "export",
    "verify",
    regenerate=0,
)

# Sidecars that the manifest agrees with.
_NOT_EXPLAINED = (
    "no outputs",
    "another's name",
    "all tensors gone",
)  # explain needs what a case catches alone
for name, case, change, says in (
    ("why is a list", MOE, {"why": ["x"]}, "case.why: expected str"),
    ("why is null", LAYOUT, {"why": None}, "case.why: expected str, got None"),
    ("kept for a number", MOE, {"unique_for": 3}, "case.unique_for: expected str"),
    ("catches numbers", MOE, {"catches": [1]}, r"case.catches\[0\]: expected str"),
    ("catches an object", MOE, {"catches": {}}, "case.catches: expected a list"),
    ("parameters of parameters", MOE, {"parameters": {"ep_size": {"a": 1}}}, r"parameters.ep_size: expected"),
    ("kind of a command", MOE, {"kind": ESCAPE}, "case.kind: expected one of"),
    (
        "tiles in words",
        MOE,
        {"outputs": [{"tensor": "output", "tile_k": "128"}]},
        "tile_k: expected a list, got '128'",
    ),
    (
        "three tiles",
        MOE,
        {"outputs": [{"tensor": "o", "tile_k": [[128] * 3]}]},
        r"tile_k\[0\]: expected a list of 2",
    ),
    (
        "a tile that is true",
        MOE,
        {"outputs": [{"tensor": "o", "tile_k": [[True, 1]]}]},
        "expected int, got True",
    ),
    (
        "a shape of fractions",
        MOE,
        {"tensors": {"input": {"dtype": "", "shape": [2.5], "sha256": ""}}},
        "expected int",
    ),
    ("pending in words", MOE, {"pending": "yes"}, "case.pending: expected bool"),
    ("no outputs", MOE, {"outputs": []}, "expected outputs of kind 'moe'"),
    ("another's name", MOE, {"suite": "../../etc"}, "says that it is ../../etc/slot_order: renamed"),
    ("derived from a number", MOE, {"derived": {"w": 3}}, "case.derived.w: expected an object"),
    ("all tensors gone", MOE, {"tensors": {}}, "expected the tensors"),
):
    hostile(
        f"sidecar: {name}",
        forge(case, lambda s, change=change: s.update(change)),
        says,
        "show layout" if case == LAYOUT else "show",
        "explain",
        "conform",
        verify=1,
        **dict.fromkeys(["explain"] * (name in _NOT_EXPLAINED), 0),
    )
hostile(
    "sidecar: nested deeply",
    both(write(f"goldens/{MOE}.json", DEEP), forge_tensors(MOE, b"")),
    "not JSON: nested too deeply",
    "show",
    "conform",
    "explain",
    "export",
    verify=1,
)
for name, case, parameters, says in (
    ("no parameters", MOE, None, "not a case of kind moe: KeyError: 'ep_size'"),
    ("a rank of 10^30", MOE, {"ep_rank": 10**30}, "not a case of kind moe: .*ep_rank: expected an int"),
    ("no ranks", MOE, {"tp_size": 0}, "tp_size: expected an int"),
    ("strict in words", MOE, {"strict": "no"}, "strict: expected a bool"),
):
    hostile(
        f"sidecar: {name}",
        forge(
            case, lambda s, new=parameters: s.update(parameters={} if new is None else s["parameters"] | new)
        ),
        says,
        "conform",
        show=0,
        verify=1,
    )
for name, case, change, says in (
    ("an operation of Python's", LAYOUT, {"operation": "__class__"}, "operation: expected one of"),
    ("an operation that is no layout", LAYOUT, {"operation": "check_tensor"}, "operation: expected one of"),
    ("no such generation", LAYOUT, {"generation": "9.9"}, "generation: expected"),
    ("an argument more", LAYOUT, {"evil": 1}, "unexpected keyword argument 'evil'"),
    ("a router that is none", ROUTING, {"preset": "eval"}, "raised: KeyError: 'eval'"),
    ("more experts than there are", ROUTING, {"top_k": 10**9}, "top_k: expected"),
):
    hostile(
        f"sidecar: {name}",
        forge(case, lambda s, change=change: s["parameters"].update(change)),
        says,
        verify=1,
        conform=1,
    )
hostile(
    "sidecar: a K tile that divides nothing",
    forge(MOE, lambda s: s["outputs"].append({"tensor": s["outputs"][0]["tensor"], "tile_k": [[100, 128]]})),
    "not a case of kind moe: .*tile",
    "conform",
    show=0,
    verify=1,
)
for name, recipe, says in (
    ("of 2^60 elements", {"shape": [1 << 20, 1 << 20, 1 << 20]}, "expected a recipe that can be followed"),
    ("of negative size", {"shape": [-1, 4, 4]}, "expected a recipe that can be followed, got ValueError"),
    ("of no size", {"shape": []}, "expected a recipe that can be followed"),
    ("by no rule", {"rule": "eval"}, "rule: expected one of"),
    (
        "of an expert that is not there",
        {"experts": [99]},
        "expected a recipe that can be followed, got IndexError",
    ),
    ("of a negative seed", {"seed": -1}, "seed: expected an int"),
    (
        "larger than its place",
        {"content": [1, 9, 9]},
        "expected a recipe that can be followed, got RuntimeError",
    ),
    ("of another hash", {}, "expected SHA-256 00, the generator gave"),
):
    whole = {
        "shape": [2, 4, 4],
        "content": [1, 4, 4],
        "rule": "bytes",
        "seed": 1,
        "experts": [0],
        "first_expert": 0,
    }
    hostile(
        f"recipe: {name}",
        forge(MOE, lambda s, r=recipe, w=whole: s.update(derived={"fc1_scales": {**w, "sha256": "00", **r}})),
        f"derived tensor fc1_scales: .*{says}",
        "conform",
        show=0,
        verify=1,
    )
for name, text, says in (
    ("escapes", ESCAPE, SHOWN),
    ("a lone surrogate", "\ud800", r"\\ud800"),
    ("text from right to left", "\u202etxet", r"\\u202etxet"),
    ("line separators", "a\u2028b\x85c\x0cd", r"a\\u2028b\\x85c\\x0cd"),
    ("tabs for a line of its own", "a\n\nverdict", "verdict"),
):
    hostile(
        f"sidecar: why has {name}",
        forge(MOE, lambda s, text=text: s.update(why=text, unique_for=text)),
        says,
        show=0,
    )

# Tensors that the manifest agrees with.
for name, data in (
    ("empty", b""),
    ("eight bytes", b"\xff" * 8),
    ("a header of 2^63 bytes", tensor_file({}, length=1 << 63)),
    ("a header nested deeply", tensor_file('{"a":' + "[" * 90_000)),
    ("a header that is a list", tensor_file([])),
    ("a dtype that is none", one_tensor("Q9", [4], 4)),
    ("a dtype that torch lacks", one_tensor("F6_E2M3", [4], 3)),
    ("a hole", tensor_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}, b"12345678")),
    ("a shape beyond its bytes", one_tensor("U8", [1 << 62, 4], 4)),
    ("a negative shape", one_tensor("U8", [-4], 4)),
    ("a pickle", PICKLE),
):
    hostile(
        f"golden tensors: {name}",
        forge_tensors(MOE, data),
        "slot_order.*expected",
        "show",
        "conform",
        "export",
        verify=1,
    )
    hostile(
        f"shard: {name}",
        write(SHARD, data),
        "cannot be read|expected a safetensors file|not there",
        "layer",
        checkpoint=1,
    )
    hostile(
        f"compared: {name}",
        write("b.safetensors", data),
        "expected a safetensors file|cannot be read",
        "compare",
    )
    hostile(
        f"input: {name}",
        write("hidden.safetensors", data),
        "expected a safetensors file|cannot be read|expected the tensor hidden",
        "layer",
    )
hostile(
    "golden tensors: a pipe",
    fifo(f"goldens/{MOE}.safetensors"),
    "expected a regular file",
    "show",
    "conform",
    verify=1,
)
hostile(
    "golden tensors: float4",
    forge_tensors(MOE, one_tensor("F4", [4], 2)),
    "expected tensors, got KeyError: .F4",
    "show",
    verify=1,
)
hostile(
    "sidecar: a pipe",
    fifo(f"goldens/{MOE}.json"),
    "expected a regular file",
    "show",
    "explain",
    "conform",
    verify=1,
)
hostile("goldens: a foreign pipe", fifo("goldens/gemm"), "cases", verify=0, conform=0, regenerate=0)
hostile(
    "goldens: a foreign file that commands",
    write(f"goldens/{ESCAPE.replace('/', '')}", ""),
    "not in the manifest",
    verify=1,
)
hostile("goldens: a folder that leads to itself", link("goldens/layout/x", ".."), "cases", verify=0)

# Hardware records.
GOOD = f'"case": "{MOE}", "sha256": "00", "equal": true, "gpu": "H100"'
REST = '"tile_k": [1, 1], "sha256": "", "equal": true'
for name, line, says in (
    ("nested deeply", DEEP, "1: not JSON: nested too deeply"),
    ("a number", "3", "record: expected an object, got 3"),
    ("no JSON", "NVIDIA H100", "1: not JSON"),
    ("no UTF-8", b"\xff\xfe", "cannot be read: .*codec"),
    (
        "K tiles in words",
        f'{{{GOOD}, "tile_k": "128x128"}}',
        "record.tile_k: expected a list of 2, got '128x128'",
    ),
    ("one K tile", f'{{{GOOD}, "tile_k": [128]}}', "record.tile_k: expected a list of 2"),
    ("half a K tile", f'{{{GOOD}, "tile_k": [128, 64.5]}}', r"record.tile_k\[1\]: expected int, got 64.5"),
    ("an infinite K tile", f'{{{GOOD}, "tile_k": [128, 1e999]}}', "expected int, got inf"),
    ("a K tile that is true", f'{{{GOOD}, "tile_k": [true, 128]}}', "expected int, got True"),
    ("no K tiles", f"{{{GOOD}}}", "expected the key 'tile_k'"),
    ("a key twice", f'{{{GOOD}, "gpu": "H200", "tile_k": [1, 1]}}', "the key 'gpu' is there twice"),
    (
        "an unknown generation",
        f'{{{GOOD}, "tile_k": [128, 128], "generation": "9.9"}}',
        "record.generation: expected one",
    ),
    (
        "a generation that is a list",
        f'{{{GOOD}, "tile_k": [128, 128], "generation": []}}',
        "record.generation: expected",
    ),
    (
        "equal in words",
        '{"case": "a/b", "tile_k": [1, 1], "sha256": "", "equal": "yes", "gpu": ""}',
        "expected bool",
    ),
    ("an empty line", f'\n{{{GOOD}, "tile_k": [128, 128]}}', "1: not JSON"),
):
    hostile(f"record: {name}", write(RECORD, line), rf"h100\.jsonl:? ?.*{says}", "verify", "verify files")
hostile("record: a pipe", fifo(RECORD), "h100.jsonl: cannot be read: .*regular file", "verify files")
hostile("record: a folder", directory(RECORD), "h100.jsonl: cannot be read: .*regular file", "verify files")
for name, record, says in (
    (
        "tiles that no output is for",
        f'{{{GOOD}, "tile_k": [64, -1]}}',
        "the golden has no output for these tiles",
    ),
    ("a hash of nothing", f'{{{GOOD}, "tile_k": [128, 128]}}', "recorded SHA-256 00"),
    ("a case of nothing", f'{{"case": "\\ud800\\u001b[2J", "gpu": "", {REST}}}', r"\\ud800\\x1b\[2J: rec"),
    ("a GPU that commands", f'{{"case": "{MOE}", "gpu": "\\u001b[2J", {REST}}}', r"\\x1b\[2J"),
):
    hostile(f"record: {name}", write(RECORD, record), says, **{"verify files": 1})
hostile("record: empty", write(RECORD, ""), "hardware record: none", **{"verify files": 0})

# Checkpoints.
for name, data, says in (
    ("nested deeply", DEEP, "nested too deeply"),
    ("a list", "[]", "expected a JSON object, got list"),
    (
        "leads out",
        '{"weight_map": {"a": "../hidden.safetensors"}}',
        "expected the name of a .safetensors file beside it",
    ),
    (
        "leads to NUL",
        '{"weight_map": {"a": "x\\u0000.safetensors"}}',
        "expected the name of a .safetensors file",
    ),
    (
        "leads to a list",
        '{"weight_map": {"a": ' + "[" * 500 + "]" * 500 + "}}",
        "expected the name of a .safetensors file",
    ),
    ("names that command", '{"weight_map": {"\\u001b]0;title\\u0007\\u001b[2J": "x.safetensors"}}', SHOWN),
    (
        "a tensor twice",
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "the key 'a' is there twice",
    ),
    (
        "a million experts",
        '{"weight_map": {"layers.0.ffn.experts.999999.w1.weight": "x.safetensors"}}',
        "layers.0.ffn.experts.999999.w1.weight: expected in .*x.safetensors, which cannot be read",
    ),
):
    hostile(
        f"index: {name}",
        write(f"checkpoint/{INDEX}", data),
        says,
        "layer",
        checkpoint=1 if name == "a million experts" else 2,
    )
hostile(
    "index: a pipe",
    fifo(f"checkpoint/{INDEX}"),
    "expected a JSON file, .*regular file",
    "layer",
    "checkpoint",
)
hostile("index: a link to nothing", link(f"checkpoint/{INDEX}", "gone"), "No such file", "layer")
hostile("index: a folder", directory(f"checkpoint/{INDEX}"), "expected a JSON file, .*regular file", "layer")
hostile("shard: a pipe", fifo(SHARD), "cannot be read: .*expected a regular file", "layer", checkpoint=1)
hostile(
    "shard: a GGUF file that is a pipe",
    both(
        lambda f: [p.unlink() for p in (f / "checkpoint").iterdir() if p.name != "config.json"],
        fifo("checkpoint/z.gguf"),
    ),
    "z.gguf: expected a GGUF file, .*regular file",
    "layer",
    "checkpoint",
)
for name, (data, says) in hostile_gguf.LYING.items() if find_spec("gguf") else ():
    hostile(
        f"GGUF: {name}",
        both(
            lambda f: [p.unlink() for p in (f / "checkpoint").iterdir()],
            write("checkpoint/z.gguf", data),
        ),
        says,
        "layer",
        "checkpoint",
    )
hostile("shard: a folder", directory(SHARD), "cannot be read: .*expected a regular file", "layer")
hostile(
    "shard: a device without end",
    link(SHARD, "/dev/zero"),
    "cannot be read: .*expected a regular file",
    "layer",
)
hostile(
    "shards without an index, one a pipe",
    both(lambda f: (f / "checkpoint" / INDEX).unlink(), fifo("checkpoint/z.safetensors")),
    "z.safetensors: expected a safetensors file, .*regular file",
    "layer",
)
CONFIG = "checkpoint/config.json"
for name, key, value, says in (
    (
        "a limit that float32 makes 0",
        "swiglu_limit",
        1e-50,
        "config.json: swiglu_limit: expected 0 or a float32 number, from 2",
    ),
    ("a limit of 1e39", "swiglu_limit", 1e39, "swiglu_limit: expected a finite float32 number"),
    ("a limit of Inf", "swiglu_limit", float("inf"), "swiglu_limit: expected a finite float32 number"),
    ("a limit of NaN", "swiglu_limit", float("nan"), "swiglu_limit: expected a finite float32 number"),
    ("a limit below 0", "swiglu_limit", -1, "limit: expected a positive"),
    ("a limit in words", "swiglu_limit", ESCAPE, "swiglu_limit: expected a float, got str"),
    ("a limit that is true", "swiglu_limit", True, "swiglu_limit: expected a float, got bool"),
    ("a list of limits", "swiglu_limit", [[7.0]], "swiglu_limit: expected a float, got list"),
    ("10^30 experts", "num_local_experts", 10**30, "expected"),
    ("-1 experts", "num_local_experts", -1, "expected"),
    ("half an expert", "num_local_experts", 4.5, "num_local_experts: expected int, got 4.5"),
    ("no experts a token", "num_experts_per_tok", 0, "top_k: expected"),
    ("10^30 experts a token", "num_experts_per_tok", 10**30, "num_experts_per_tok: expected an int from 0"),
    ("more experts a token than there are", "num_experts_per_tok", 5, "top_k: expected"),
    ("another size", "hidden_size", 64, "expected hidden_size=64 of config.json, got 96"),
    ("a factor of its own", "routed_scaling_factor", 2.5, "routed_scaling_factor: expected None"),
    (
        "a key of unknown effect",
        "router_bias_scale",
        2,
        "router_bias_scale=2: expected keys whose effect is known",
    ),
    ("a text model in words", "text_config", ESCAPE, "text_config: expected an object"),
    (
        "a text model that disagrees",
        "text_config",
        {"swiglu_limit": 8.0},
        "swiglu_limit: expected one value, got 7.0",
    ),
    ("a scheme that is a list", "quantization_config", [1], "quantization_config: expected dict"),
    (
        "a scheme of deep lists",
        "quantization_config",
        {"quant_method": "quark", "algo_config": [[{}]]},
        "fp4",
    ),
    ("another scheme", "quantization_config", {"quant_method": "gptq"}, "quant_method: expected mxfp4"),
    ("an activation", "hidden_act", {"silu": 1}, "hidden_act: expected str"),
):
    hostile(f"config: {name}", edit(CONFIG, lambda c, new={key: value}: c.update(new)), says, "layer")
hostile(
    "config: nested deeply",
    write(CONFIG, DEEP),
    "config.json: expected a JSON file, got .*nested too deeply",
    "layer",
)
hostile("config: a pipe", fifo(CONFIG), "config.json: expected a JSON file, .*regular file", "layer")
hostile(
    "config: a link to nothing",
    link(CONFIG, "gone"),
    "config.json: expected a JSON file, .*No such file",
    "layer",
)
hostile(
    "config: a key twice",
    write(CONFIG, '{"swiglu_limit": 7, "swiglu_limit": 8}'),
    "the key 'swiglu_limit' is there twice",
    "layer",
)

# The input of a layer.
hostile("input: a pipe", fifo("hidden.safetensors"), "expected a safetensors file, .*regular file", "layer")
hostile(
    "input: float32",
    tensors("hidden.safetensors", hidden=BF16.float()),
    "hidden: expected a bfloat16 tensor",
    "layer",
)
hostile(
    "input: three dimensions", tensors("hidden.safetensors", hidden=BF16[None]), "hidden: expected", "layer"
)
hostile(
    "input: a column more",
    tensors("hidden.safetensors", hidden=torch.ones(3, 97).bfloat16()),
    "hidden: expected",
    "layer",
)
hostile(
    "input: no hidden states",
    tensors("hidden.safetensors", logits=torch.ones(3, 4)),
    "expected the tensor hidden",
    "layer",
)
hostile(
    "input: a tensor that commands",
    tensors("hidden.safetensors", hidden=BF16, **{ESCAPE: BF16.clone()}),
    SHOWN,
    "layer",
)
hostile(
    "input: logits of 5 experts",
    tensors("hidden.safetensors", hidden=BF16, logits=torch.ones(3, 5)),
    "logits: expected",
    "layer",
)
hostile(
    "input: logits of NaN",
    tensors("hidden.safetensors", hidden=BF16, logits=torch.full((3, 4), torch.nan)),
    "logits: expected",
    "layer",
)
hostile(
    "input: padding in float",
    tensors("hidden.safetensors", hidden=BF16, padded=torch.ones(3)),
    "padded: expected",
    "layer",
)
hostile(
    "input: float4",
    write("hidden.safetensors", one_tensor("F4", [1, 4], 2, "hidden")),
    "hidden: expected",
    "layer",
)
hostile(
    "input: no tokens", tensors("hidden.safetensors", hidden=BF16[:0]), r"output +bfloat16 \[0, 96\]", layer=0
)
hostile("input: NaN and Inf", tensors("hidden.safetensors", hidden=BF16 * torch.inf), "(nan|logits)", "layer")

# What a server gave. Every file that cannot be compared is exit code 2; whatever the server did is 1.
SERVED = "served.safetensors"
IDS, WEIGHTS = torch.tensor([[2, 1], [2, 0], [1, 0]]), torch.ones(3, 2)
for name, spoil, says in (
    ("a pipe", fifo(SERVED), "expected a safetensors file, .*regular file"),
    ("a terabyte", sparse(SERVED), "expected a safetensors file"),
    ("nothing", write(SERVED, ""), "expected a safetensors file"),
    ("no output", tensors(SERVED, hidden=BF16), "expected one of routed_output, output, rank_output"),
    ("two outputs", tensors(SERVED, output=BF16, rank_output=BF16.clone()), "expected one of"),
    ("float32", tensors(SERVED, output=BF16.float()), "output: expected a bfloat16 tensor"),
    ("a token less", tensors(SERVED, output=BF16[:2].clone()), "output: expected"),
    (
        "no tokens",
        both(tensors(SERVED, output=BF16[:0]), tensors("hidden.safetensors", hidden=BF16[:0])),
        "output: expected the output of one token or more",
    ),
    (
        "ids of float",
        tensors(SERVED, output=BF16, token_selected_experts=IDS.float()),
        "expected an int32 or",
    ),
    (
        "a slot less",
        tensors(SERVED, output=BF16, token_selected_experts=IDS[:, :1].clone()),
        "expected an int",
    ),
):
    hostile(f"served: {name}", spoil, says, "layer served")
for name, served, says in (
    ("NaN", {"output": BF16 * torch.nan}, "the output is wrong"),
    ("ids beyond 32 bits", {"output": BF16, "token_selected_experts": IDS + (1 << 32)}, "is no expert's"),
    ("an id twice", {"output": BF16, "token_selected_experts": IDS * 0}, "names an expert twice"),
    (
        "weights of NaN",
        {"output": BF16, "token_selected_experts": IDS, "token_final_scales": WEIGHTS * torch.nan},
        "all weights are nan",
    ),
    ("a name that commands", {"output": BF16, ESCAPE: BF16.clone()}, SHOWN),
):
    hostile(f"served: {name}", tensors(SERVED, **served), says, layer_served=1)

# Files to be compared.
BOTH = ("a.safetensors", "b.safetensors")
hostile("compared: a pipe", fifo("a.safetensors"), "expected a safetensors file, .*regular file", "compare")
hostile(
    "compared: without tensors",
    both(*(write(n, tensor_file({})) for n in BOTH)),
    "got none in either",
    "compare",
)
hostile(
    "compared: one without tensors",
    write("a.safetensors", tensor_file({})),
    "expected a tensor that both files have, got none in a.safetensors and output in b.safetensors",
    "compare",
)
hostile(
    "compared: 5,000 tensors of other names",  # each with each would take a minute
    both(*(tensors(n, **{f"{n}{i}": BF16[0, :1].clone() for i in range(5000)}) for n in BOTH)),
    "expected a tensor that both files have",
    "compare",
)
hostile(
    "compared: metadata that is a number",
    write("a.safetensors", tensor_file({"__metadata__": 3})),
    "expected a safetensors file",
    "compare",
)
hostile(
    "compared: names that command",
    both(*(tensors(n, **{ESCAPE: BF16}) for n in BOTH)),
    f"{SHOWN}: equal",
    compare=0,
)
for name, one, other, says in (
    (
        "float64 of both signs",
        torch.ones(1).double(),
        -torch.ones(1).double(),
        "at most 9,214,364,837,600,034,816 ulp",
    ),
    (
        "float8 of both signs",
        torch.ones(1).to(torch.float8_e5m2),
        (-torch.ones(1)).to(torch.float8_e5m2),
        "at most 120 ulp",
    ),
    ("complex", torch.ones(1, dtype=torch.complex64), 1j * torch.ones(1), "1 of 1 elements differ"),
    (
        "uint64",
        torch.tensor([1 << 63], dtype=torch.uint64),
        torch.tensor([0], dtype=torch.uint64),
        r"differ, by 9,223,372,036,854,775,806 or more; first .*, by 9,223,372,036,854,775,806 or more\n",
    ),
    (
        "integers at both ends",
        torch.tensor([(1 << 63) - 1]),
        torch.tensor([-(1 << 63)]),
        "got 9223372036854775807, expected -9223372036854775808",
    ),
    (
        "float64 at both ends",
        torch.tensor([1.7e308], dtype=torch.float64),
        torch.tensor([-1.7e308], dtype=torch.float64),
        "differ, 9,223,372,036,854,775,806 or more ulp",
    ),
    ("bool", torch.tensor([True]), torch.tensor([False]), "1 of 1 elements differ"),
    (
        "bool of other bits",
        torch.tensor([2], dtype=torch.uint8).view(torch.bool),
        torch.tensor([True]),
        r"got 0x02 \(True\), expected 0x01 \(True\)",
    ),
    ("scalars", torch.tensor(1.0), torch.tensor(2.0), r"first at \[\]: got 0x3F800000"),
    ("only NaN", torch.tensor([torch.nan]), -torch.tensor([torch.nan]), "NaNs of other bits"),
    ("empty, of other shapes", torch.ones(0, 3), torch.ones(3, 0), r"float32 \[0, 3\] in a"),
):
    hostile(
        f"compared: {name}",
        both(tensors(BOTH[0], output=one), tensors(BOTH[1], output=other)),
        says,
        compare=1,
    )
hostile(
    "compared: nothing to differ",
    both(*(tensors(n, output=torch.ones(0)) for n in BOTH)),
    "expected a tensor with elements, got none that both",
    "compare",
)
MANY = {f"t{number:03}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(300)}
hostile(
    "compared: 300 other names",
    write("b.safetensors", tensor_file(MANY)),
    r"got output in a.safetensors and t000, [t0-7, ]+, 292 others in b.safetensors",
    "compare",
)
hostile(
    "golden tensors: 300 other names",
    forge_tensors(MOE, tensor_file(MANY)),
    r"got t000, [t0-7, ]+, 292 others",
    "show",
    "conform",
    verify=1,
)
hostile(
    "compared: no elements of vast sizes",
    both(*(write(name, one_tensor("BF16", [0, 1 << 62, 1 << 62], 0)) for name in BOTH)),
    "expected a tensor with elements, got none that both",
    "compare",
)
hostile(
    "compared: equal float4",
    both(*(write(n, one_tensor("F4", [4], 2)) for n in BOTH)),
    "output: equal",
    compare=0,
)
hostile(
    "compared: float4",
    both(write(BOTH[0], one_tensor("F4", [4], 2)), write(BOTH[1], one_tensor("F4", [4], 2)[:-1] + b"\x09")),
    r"1 of 2 elements differ.*got 0x02 \(1 0\), expected 0x09 \(-0.5 0\)",
    compare=1,
)

# Recorded calls: one of them is damaged, so that the others still are equal.
METADATA = f"{CALL}/metadata.jsonl"
for name, spoil, says in (
    ("nested deeply", write(METADATA, DEEP), "expected a JSON object a line"),
    ("a pipe", fifo(METADATA), "cannot be read: .*regular file"),
    ("a folder", directory(METADATA), "cannot be read: .*regular file"),
    ("a terabyte", sparse(METADATA), "expected at most 1,073,741,824 bytes"),
    ("a device without end", link(METADATA, "/dev/zero"), "expected a regular file"),
    ("a link to nothing", link(METADATA, "gone"), "metadata.jsonl: missing"),
    ("a key twice", write(METADATA, '{"input_metadata": {}, "input_metadata": {}}'), "JSON object a line"),
    ("arguments in a list", write(METADATA, '{"input_metadata": [[]]}'), "an object under input_metadata"),
    ("an argument -1", write(METADATA, '{"input_metadata": {"arg_9": 1}}'), "without a gap, got arg_9"),
    (
        "an argument of 5,000 digits",
        write(METADATA, json.dumps({"input_metadata": {"arg_" + "9" * 5000: 1}})),
        "kwarg_NAME, got 'arg_999",
    ),
    (
        "arguments that command",
        write(METADATA, json.dumps({"input_metadata": {ESCAPE: 1}})),
        "kwarg_NAME, got",
    ),
):
    hostile(f"metadata: {name}", spoil, f"unreadable.*{says}", replay=1)
for name, data in (
    ("empty", b""),
    ("a header of 2^63 bytes", tensor_file({}, length=1 << 63)),
    ("a header nested deeply", tensor_file('{"a":' + "[" * 90_000)),
    ("a dtype that torch lacks", one_tensor("F6_E2M3", [4], 3)),
    ("a shape beyond its bytes", one_tensor("U8", [1 << 62, 4], 4)),
    ("a pickle", PICKLE),
):
    for kind in ("inputs", "outputs"):
        hostile(
            f"{kind}: {name}", write(f"{CALL}/{kind}.safetensors", data), f"{kind}.safetensors: ", replay=1
        )
    hostile(f"{kind}: {name}, for torch", write(f"{CALL}/inputs.pt", data), "inputs.pt: cannot", replay=1)
for name, value in (
    ("float4", one_tensor("F4", [2, 128], 128, "result")),
    ("a scalar", one_tensor("BF16", [], 2, "result")),
    ("no tokens", one_tensor("BF16", [0, 128], 0, "result")),
    ("integers", one_tensor("I16", [2, 3], 12, "result")),
):
    hostile(f"outputs: {name}", write(f"{CALL}/outputs.safetensors", value), "wrong output", replay=1)
hostile("inputs: a pipe", fifo(f"{CALL}/inputs.safetensors"), "unreadable.*no recorded inputs", replay=1)
for where, place in (("", CALL), (" of a flush", FLUSH)):
    hostile(
        f"inputs: a tensor less{where}",
        without(f"{place}/inputs.safetensors", "kwarg_input"),
        "unreadable.*missing a required argument: 'input', which the call had",
        replay=1,
    )
hostile("inputs: a terabyte", sparse(f"{CALL}/inputs.safetensors"), "inputs.safetensors: cannot", replay=1)
hostile("outputs: a folder", directory(f"{CALL}/outputs.safetensors"), "no recorded output", replay=0)


def edit_last(name: str, change: Callable[[Any], object]) -> Spoil:
    """Change the last line of the metadata, and leave no other."""

    def spoil(folder: Path) -> None:
        stored = json.loads((folder / name).read_text().splitlines()[-1])
        change(stored)
        write(name, json.dumps(stored))(folder)

    return spoil


def argument(name: str, value: object) -> Spoil:
    """Another value of an argument that is no tensor."""
    return edit_last(METADATA, lambda stored: stored["input_metadata"].update({f"kwarg_{name}": value}))


DEEP_LIST: list[object] = []
for _ in range(400):
    DEEP_LIST = [DEEP_LIST]
for name, key, value, code in (
    ("rank 5 of 2", "ep_rank", 5, 1),
    ("a rank of 10^30", "ep_rank", 10**30, 1),
    ("0 ranks", "tp_size", 0, 1),
    ("endless ranks", "ep_size", float("inf"), 1),
    ("an input that is a number, too", "input", 3, 1),
    ("ranks in words", "ep_size", ESCAPE, 1),
    ("a rank that is true", "ep_rank", True, 1),
    ("an output dtype of Python's", "output_dtype", {"type": "torch.dtype", "value": "torch.load"}, 0),
    ("scales nested deeply", "quant_scales", {"type": "list", "truncated": False, "items": DEEP_LIST}, 1),
    ("a kernel of words", "kernel", {"type": "Sm90Kernel", "gemm1": "x"}, 1),
    (
        "a kernel of 10^30",
        "kernel",
        {"type": "Sm90Kernel", "gemm1": {"tile": [10**30] * 3}, "gemm2": {}, "generation": "wordwise"},
        1,
    ),
    ("a layout of words", "weight_layout", ESCAPE, 1),
    (
        "profile ids of NaN",
        "profile_ids",
        {"type": "list", "truncated": False, "items": [float("nan"), 1]},
        1,
    ),
    ("an argument that commands", ESCAPE, 1, 0),
):
    hostile(f"arguments: {name}", argument(key, value), "(skipped|refused|unreadable)", replay=code)
hostile(
    "outputs: a name of two lines",
    tensors(f"{CALL}/outputs.safetensors", **{"a\nrank0: equal": BF16}),
    r"\A(?!.*\nrank0: equal).*got a\\nrank0: equal",
    replay=1,
)
hostile(
    "metadata: a release of two lines",
    edit_last(METADATA, lambda m: m["versions"].update(flashinfer="9\nrank0: equal")),
    r"\A(?!.*rank0: equal)",
    replay=0,
)
hostile(
    "calls: one beside another of the same name, but for a line's end",
    lambda f: shutil.copytree(f / CALL, f / f"{CALL}\n"),
    r"4 recorded calls.*call0001\\n",
    replay=0,
)
hostile(
    "calls: a folder that commands",
    lambda f: (f / "calls/rank0").rename(f / "calls" / ESCAPE.replace("/", "")),
    SHOWN,
    replay=0,
)
hostile("calls: a folder in itself", link("calls/rank0/again", "../.."), "3 recorded calls", replay=0)
hostile(
    "calls: not mounted", link("calls/rank2", "/mnt/gone/rank2"), "calls/rank2: expected a file", "replay"
)
hostile("calls: flushes that are gone", link(f"{CALL}/graph_flushes", "x"), "graph_flushes: exp", "replay")
hostile("calls: flushes that are a file", write(f"{CALL}/graph_flushes", ""), "3 recorded calls", replay=0)
hostile(
    "calls: none", lambda f: shutil.rmtree(f / "calls/rank0") or shutil.rmtree(f / "calls"), "calls", "replay"
)
for name, data in (
    ("empty", ""),
    ("nested deeply", DEEP),
    ("a list", "[]"),
    ("no UTF-8", b"\xff"),
    ("keys nested deeply", json.dumps({"('trtllm::fused_moe::gemm1'" + "(" * 9999: ["MoERunner", 1]})),
    (
        "keys that run",
        json.dumps({"('trtllm::fused_moe::gemm1', __import__('os').getpid())": ["MoERunner", 1]}),
    ),
):
    hostile(
        f"cache: {name}", write("autotune.json", data), "autotune cache: expected entries", "replay cache"
    )
hostile("cache: a pipe", fifo("autotune.json"), "autotune", "replay cache")
for name, tactic in (("of 10^30", 10**30), ("in words", ESCAPE), ("of NaN", float("nan")), ("of none", None)):
    hostile(
        f"cache: a tactic {name}",
        edit(
            "autotune.json", lambda c, t=tactic: {k: [v[0], t, 0] if k[0] == "(" else v for k, v in c.items()}
        ),
        "no prediction",
        replay_cache=0,
    )

# Where exports go.
hostile("export: a file in the way", write("exported", "mine"), "exported", "export")
hostile(
    "export: a link out",
    lambda f: ((f / "exported").mkdir(), (f / "exported" / "blob").symlink_to(f / "checkpoint")),
    "expected no link to write to",
    "export",
)
hostile(
    "export: into the goldens",
    link("exported", "goldens/gemm"),
    "expected one outside of the goldens",
    "export",
)

DAMAGED = int(os.environ.get("MXFP4REF_FUZZ_FILES", "30"))
RUNS = [(name, command) for name, (_, _, codes) in HOSTILE.items() for command in codes]


def one_of_each() -> list[Any]:
    """Each file with one of the commands that read it, by turns."""
    usual = {
        (name, [*codes][number % len(codes)]) for number, (name, (_, _, codes)) in enumerate(HOSTILE.items())
    }
    return [run if run in usual else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "whole"
    make_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    # Linked: whatever spoils or writes a file puts another in its place.
    return Path(shutil.copytree(whole, tmp_path / "folder", copy_function=os.link))


@pytest.mark.parametrize("command", COMMANDS)
def test_unspoilt_files_are_read(folder: Path, command: str) -> None:
    outcome = run(folder, COMMANDS[command])
    assert (outcome.code, outcome.problem) == (0, ""), outcome.output


ODD = os.fsdecode(b'caf\xe9 "$x')  # a name that is not UTF-8, as a folder may have it


@pytest.fixture(scope="module")
def odd(whole: Path) -> Path:
    place = whole.parent / ODD
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    return Path(shutil.copytree(whole, place / ODD))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("verify", "conform")])
def test_names_that_are_not_utf8(odd: Path, command: str) -> None:
    """safetensors and torch take no such paths."""
    first, *words = COMMANDS[command]
    known = {word for word in words if (odd / word).exists()} | set(WRITES.values())
    outcome = run(odd, (first, *(str(odd / word) if word in known else word for word in words)))
    assert (outcome.code, outcome.problem) == (0, ""), outcome.output


def test_a_reproducer_where_names_are_not_utf8(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel lies there, too; and what it prints is UTF-8."""
    (odd / "kernel.py").write_text(
        "from mxfp4ref import torch_ref_cutlass_fused_moe\n\n\ndef f(**named):\n"
        "    return -torch_ref_cutlass_fused_moe(**named)[0]\n"
    )
    command = ("conform", f"{odd / 'kernel.py'}:f", "--no-isolate", "--goldens", str(odd / "goldens"))
    files = (f"--{kind}={odd / kind}" for kind in ("json", "junit"))
    outcome = run(odd, (*command, "--case", MOE, "--dump", str(odd / "dump"), "--diagnosis=none", *files))
    assert (outcome.code, outcome.problem) == (1, ""), outcome.output
    (script,) = (odd / "dump").glob("*.py")
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    assert b"the same bits that were recorded" in said.buffer.getvalue()
    assert b"caf\\udce9" in said.buffer.getvalue()


@pytest.mark.parametrize(("name", "command"), one_of_each())
def test_hostile(folder: Path, name: str, command: str) -> None:
    spoil, says, codes = HOSTILE[name]
    spoil(folder)
    before = contents(folder)
    outcome = run(folder, COMMANDS[command])
    assert outcome.problem == "", outcome.output
    assert outcome.code == codes[command], outcome.output
    if outcome.code or set(codes.values()) == {0}:
        assert re.search(says, outcome.output, re.DOTALL), outcome.output
    after = contents(folder)
    written = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    assert all(p.startswith(WRITES.get(command, "nothing")) for p in written), written
    assert command != "regenerate" or outcome.code == 0 or not written


NESTED = 1100  # more than Python has frames


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (COMMANDS["verify files"], "goldens/hardware"),
        (COMMANDS["regenerate"], "goldens/hardware"),
        (("goldens", "pack", "packed.tar", "--goldens", "goldens"), "goldens/hardware"),
        (COMMANDS["replay"], "calls"),
        (("replay", "calls", "--autotune-cache", "caches", "--any-tile", "--diagnosis=none"), "caches"),
    ],
)
def test_folders_nested_deeply(folder: Path, command: tuple[str, ...], place: str) -> None:
    (folder / "caches").mkdir()
    shutil.copy(folder / "autotune.json", folder / "caches")
    with chdir(folder / place):  # so that no path is long
        for _ in range(NESTED):
            os.mkdir("a")
            os.chdir("a")
        try:
            outcome = run(folder, command)
        finally:
            for _ in range(NESTED):  # which shutil cannot remove
                os.chdir("..")
                os.rmdir("a")
    assert (outcome.code, outcome.problem) == (0, ""), outcome.output


FOREIGN = [
    *(
        name
        for name in HOSTILE
        if re.match("manifest: (empty|nested|no UTF|a list|another|a form|a key|a lone|a num)", name)
    ),
    *(
        "manifest: a pipe",
        "manifest: a terabyte",
        "manifest: a folder",
        "manifest: a device without end",
        "manifest: a link to itself",
    ),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_goldens_of_another_project_above_are_passed_over(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MXFP4REF_GOLDENS", raising=False)
    HOSTILE[name][0](folder)
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    outcome = run(below, ("show", MOE))  # that of this checkout
    assert (outcome.code, outcome.problem) == (0, ""), outcome.output


@pytest.mark.parametrize(
    ("variable", "value", "command", "says"),
    [
        ("MXFP4REF_GOLDENS", "nowhere", "show", "expected a folder with a manifest.json, got 'nowhere'"),
        (
            "MXFP4REF_GOLDENS",
            "a.safetensors",
            "explain",
            "expected a folder with a manifest.json, got 'a.saf",
        ),
        ("MXFP4REF", "swap", "conform", "expected it not to be set here, got 'swap'"),
        ("MXFP4REF", "swap", "record", "expected it not to be set here, got 'swap'"),
        ("MXFP4REF", "swap", "invariance of a kernel", "expected it not to be set here, got 'swap'"),
    ],
)
def test_variables_of_the_environment(
    folder: Path, variable: str, value: str, command: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    given = {
        "show": ("show", MOE),
        "explain": ("explain", "bf16_finalize"),
        "conform": ("conform", "oracle"),
        "record": ("record", "x.py", "--output", "calls"),
        "invariance of a kernel": ("invariance", "oracle"),
    }
    outcome = run(folder, given[command])
    assert (outcome.code, outcome.problem) == (2, ""), outcome.output
    assert f"Error: {variable}: {says}" in outcome.output
    assert outcome.output.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--junit", "--html"])
@pytest.mark.parametrize("spec", ["{}.kernels:f", "logical:{}.kernels:f", "stage:gemm:{}.kernels:f.g"])
@pytest.mark.parametrize("file", ["{}/kernels.py", "{}/__init__.py", "goldens/hardware/h100.jsonl"])
def test_no_report_replaces_the_kernel(
    folder: Path, option: str, spec: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "of_a_user"
    (folder / package).mkdir()
    for name in ("__init__", "kernels"):
        (folder / package / f"{name}.py").write_text("f = 1\nraise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(folder)
    before = contents(folder)
    report = (option, file.format(package))
    outcome = run(folder, ("conform", spec.format(package), "--goldens", "goldens", *report))
    assert (outcome.code, outcome.problem) == (2, ""), outcome.output
    assert "expected another file than the input" in outcome.output
    assert contents(folder) == before


@pytest.mark.parametrize("path", ["hidden.safetensors", SHARD, "checkpoint/config.json"])
def test_no_output_of_a_layer_replaces_its_inputs(folder: Path, path: str) -> None:
    before = contents(folder)
    outcome = run(folder, (*COMMANDS["layer"], "--output", path))
    assert (outcome.code, outcome.problem) == (2, ""), outcome.output
    assert "expected another file than" in outcome.output
    assert contents(folder) == before


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", PICKLE, b"\x93NUMPY\x01\x00"])
def test_recordings_that_are_none(tmp_path: Path, data: bytes) -> None:
    """The tools' recordings: an error, and nothing is unpickled."""
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises((ValueError, OSError, EOFError, zipfile.BadZipFile)):
        recorded.load(tmp_path / "x.npz")
    marker = tmp_path / "made"
    np.savez(tmp_path / "y.npz", a=np.array([Touch(marker)], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        recorded.load(tmp_path / "y.npz")
    assert not marker.exists()


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_random_damage(whole: Path, tmp_path: Path) -> None:
    """Some of what `tools/fuzz_files.py` does for as long as one likes."""
    found = [file_fuzz.one(seed, whole, tmp_path) for seed in range(DAMAGED)]
    assert [f for f in found if f.problem] == []
    assert {f.code for f in found} == {0, 1, 2}


def test_how_many() -> None:
    assert len(HOSTILE) > 150
    assert {command for _, command in RUNS} >= set(COMMANDS) - {
        "regenerate check",
        "verify files",
        "show layout",
        "layer output",
        "invariance",
    }
