"""The manifest of a folder of goldens, and the small folder of them that a wheel contains.

The wheel's build (`hatch_build.py`) runs this file by its path, in an environment without torch and without this
package: only the standard library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "BUILTIN",
    "FILE_KINDS",
    "FORMAT",
    "derived_bytes",
    "entries",
    "json_bytes",
    "manifest_bytes",
    "write_builtin",
]

FORMAT = "mxfp4ref-goldens-1"
FILE_KINDS = ("json", "safetensors")

# Chosen to catch as many defects as fit into 1.5 MB: 131 of 139 when this was written.
BUILTIN = (
    "activation/alpha_beta_at_rounding_boundaries",
    "finalize/unusual_weights",
    "formats/every_code_every_scale_ocp_bfloat16",
    "formats/scale_bytes_0_and_255",
    "gemm/underflow_in_gemm1",
    "gemm/wide_exponents",
    "layout/fold_scales_0_6_16",
    "layout/interleave_weights",
    "parallel/sentinels_on_rank_3_of_4",
    "routing/deepseek_v3_negative_scores_one_group",
    "routing/deepseek_v4_flash",
    "routing/deepseek_v4_pro_hash_layer_padded",
    "routing/gpt_oss_bf16_ties",
)

Entries = dict[str, dict[str, dict[str, Any]]]


def entries(cases: Mapping[str, Mapping[str, bytes]]) -> Entries:
    """For each case the size and SHA-256 of each of its files."""
    return {
        case_id: {
            kind: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for kind, data in files.items()
        }
        for case_id, files in cases.items()
    }


def manifest_bytes(cases: Entries, of: int = 0) -> bytes:
    """The file `manifest.json` of a folder with these cases; `of` how many there are, if these are some of them."""
    return json_bytes({"format": FORMAT, "cases": cases} | ({"of": of} if of else {}))


def json_bytes(value: object) -> bytes:
    """The one way in which the goldens write JSON, so that equal content is equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def derived_bytes(recipes: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of the tensors that a case's recipes derive, with every expert."""
    return sum(
        (2 if recipe["rule"] == "bf16" else 1) * math.prod(recipe["shape"]) for recipe in recipes.values()
    )


def write_builtin(goldens: Path, target: Path) -> None:
    """Copy the cases of `BUILTIN` from a folder of goldens to `target`, with a manifest that says of how many.

    Raises:
        FileNotFoundError: `goldens` lacks its manifest or one of the cases.
        ValueError: a file is not the one that the manifest of `goldens` describes.
    """
    manifest = json.loads((goldens / "manifest.json").read_bytes())
    recorded = manifest["cases"]
    cases = {
        case_id: {kind: (goldens / f"{case_id}.{kind}").read_bytes() for kind in FILE_KINDS}
        for case_id in BUILTIN
    }
    found = entries(cases)
    for case_id, files in cases.items():
        if found[case_id] != recorded.get(case_id):
            raise ValueError(
                f"{goldens / case_id}: expected the files of manifest.json, got others: damaged?"
            )
        for kind, data in files.items():
            path = target / f"{case_id}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (target / "manifest.json").write_bytes(manifest_bytes(found, manifest.get("of", len(recorded))))
