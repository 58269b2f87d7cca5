"""Autotune caches as flashinfer 0.7.2.post1 writes them: `AutoTuner.save_configs` and `ManagedAutotuneCache.publish`.

Keys and files were held against what these wrote for the same shapes and arguments.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METADATA = {"flashinfer_version": "0.7.2.post1", "cuda_version": "12.9", "gpu": "NVIDIA H100 80GB HBM3"}
Tactics = dict[int, tuple[Any, Any]]  # of GEMM1 and GEMM2 by the bucket of tokens


def key(arguments: dict[str, Any], gemm: int, tokens: int, **changes: Any) -> str:
    """The text under which the tactic of a GEMM is stored."""
    names = ("input", "fc1_expert_weights", "fc1_expert_biases", "fc2_expert_weights", "fc2_expert_biases")
    shapes = [tuple(t.shape) if isinstance(t := arguments[name], Tensor) else (0,) for name in names]
    shapes[0] = (tokens, *shapes[0][1:])
    further: dict[str, Any] = {
        "x_dtype": torch.bfloat16,
        "weight_dtype": arguments["fc1_expert_weights"].dtype,
        "output_dtype": torch.bfloat16,
        "top_k": arguments["token_selected_experts"].shape[1],
        "tp_size": arguments["tp_size"],
        "ep_size": arguments["ep_size"],
        "cluster_size": 1,
        "enable_alltoall": False,
        "use_deepseek_fp8_block_scale": False,
        "use_w4_group_scaling": True,
        "use_mxfp8_act_scaling": False,
        "use_wfp4afp8_humming": False,
        "min_latency_mode": False,
        "enable_pdl": True,
        "activation_type": 3,
        "use_packed_weights": False,
        "use_fused_finalize": True,
    } | changes
    return str((f"trtllm::fused_moe::gemm{gemm}", "MoERunner", tuple(shapes), tuple(further.values())))


def write_json(path: Path, arguments: dict[str, Any], tactics: Tactics, **changes: Any) -> Path:
    """A file of `save_configs`, with an entry of another operation beside the kernel's."""
    policy = ["cuda_graph_profile_replays", None, "l2_cache_policy", "hot"]
    stored: dict[str, Any] = {"_metadata": METADATA}
    stored[str(("fp4_gemm", "CudnnFp4Runner", ((4, 128), (128, 64)), ()))] = ["CudnnFp4Runner", "engine 3"]
    for tokens, pair in tactics.items():
        for gemm, tactic in enumerate(pair, 1):
            stored[key(arguments, gemm, tokens, **changes)] = ["MoERunner", tactic, policy]
    stored["_generation"] = "0" * 64
    path.write_text(json.dumps(stored, indent=2))
    return path


def write_v2(root: Path, arguments: dict[str, Any], tactics: Tactics, **manifest: str) -> Path:
    """A folder of `autotune_v2`."""
    told = METADATA | {"cache_schema": "v2"} | manifest
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    folder = root / "v2" / hashlib.sha256(text.encode()).hexdigest()[:16]
    (folder / "entries").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(told, indent=2, sort_keys=True))
    for tokens, pair in tactics.items():
        for gemm, tactic in enumerate(pair, 1):
            name = key(arguments, gemm, tokens)
            entry = {"key": name, "runner": "MoERunner", "tactic": tactic}
            file = folder / "entries" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
            file.write_text(json.dumps(entry, indent=2, sort_keys=True))
    return root
