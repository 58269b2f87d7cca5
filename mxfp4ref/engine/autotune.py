"""Which tactics flashinfer's autotuner chose for a call, by its caches on disk.

Two formats, as flashinfer 0.7.2.post1 writes them (`autotuner/autotuner.py` and `autotune_cache.py` of its source):

    a JSON file (`autotune(cache=PATH)`, `save_configs`)    {"_metadata": ..., KEY: [runner, tactic, policy]}
    a folder (`autotune_v2`)                                v2/<environment>/manifest.json
                                                            v2/<environment>/entries/<hash>.json, {"key": KEY, ...}

KEY is the text of `(operation, runner, shapes of the inputs, further arguments)`, where the number of tokens is
rounded up to a bucket. The two GEMMs are tuned as operations of their own. Where a cache has no entry the kernel runs
its default tactic.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mxfp4ref._files import files_below, parse_json, read_file
from mxfp4ref._validate import check_int
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.tactics import Sm90Kernel, runnable_tactics

__all__ = ["AutotuneCache", "Prediction", "read_autotune_cache", "token_bucket"]

_OPERATIONS = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
_RUNNER = "MoERunner"
_INPUTS = ("input", "fc1_expert_weights", "fc1_expert_biases", "fc2_expert_weights", "fc2_expert_biases")
_DEFAULT = -1
# Further arguments in a key, after the dtypes of input, weights and output and top_k.
_FURTHER = (
    *("tp_size", "ep_size", "cluster_size", "enable_alltoall", "use_deepseek_fp8_block_scale"),
    *(
        "use_w4_group_scaling",
        "use_mxfp8_act_scaling",
        "use_wfp4afp8_humming",
        "min_latency_mode",
        "enable_pdl",
    ),
    *("activation_type", "use_packed_weights", "use_fused_finalize"),
)


@dataclass(frozen=True)
class Prediction:
    """The kernel that a call is expected to have run, and who says so."""

    kernel: Sm90Kernel
    source: str


@dataclass(frozen=True)
class _Entry:
    operation: str
    shapes: tuple[Any, ...]
    further: tuple[Any, ...]  # empty in the keys of older releases
    tactic: Any
    release: str  # "" where the cache does not say


@dataclass(frozen=True)
class AutotuneCache:
    """The entries of a cache that are the kernel's.

    Attributes:
        path: the file or folder.
        problems: files in a folder that are no entries, in words; flashinfer passes over them too.
    """

    path: Path
    entries: tuple[_Entry, ...]
    problems: tuple[str, ...] = ()

    def predict(
        self, call: MoeCall, arguments: Mapping[str, Any], release: str | None = None
    ) -> Prediction | None:
        """The tactics that the cache has for a call; None if it has nothing for the call's layer.

        Args:
            call: the call, of the generation whose tactics are numbered.
            arguments: what it was made of, flashinfer's arguments by name.
            release: of flashinfer, where it is known; a cache of another one is not used.

        Raises:
            ValueError: the entries contradict each other, or name no tactic of the kernel.
        """
        bucket = token_bucket(call.num_tokens, arguments["tune_max_num_tokens"])
        further = _further(call, arguments)
        shapes = [tuple(t.shape) if isinstance(t := arguments[n], Tensor) else (0,) for n in _INPUTS]
        chosen: list[int] = []
        buckets: set[int] = set()
        for operation in _OPERATIONS:
            of_layer = [
                entry
                for entry in self.entries
                if entry.operation == operation
                and entry.shapes[1:] == tuple(shapes[1:])
                and entry.shapes[0][1:] == shapes[0][1:]
                and entry.further in ((), further)
                and not (release and entry.release and release != entry.release)
            ]
            buckets |= {entry.shapes[0][0] for entry in of_layer}
            tactics = {json.dumps(e.tactic): e.tactic for e in of_layer if e.shapes[0][0] == bucket}
            if len(tactics) > 1:
                raise ValueError(
                    f"{self.path}: expected one tactic of {operation} for {bucket} tokens, got {', '.join(tactics)}; "
                    "name the folder of one environment"
                )
            chosen.append(next(iter(tactics.values()), _DEFAULT))
        if not buckets:
            return None
        kernel = self._kernel(call, chosen)
        known = "" if bucket in buckets else f"; it has {', '.join(map(str, sorted(buckets)))} tokens only"
        return Prediction(kernel, f"the autotune cache for {bucket} tokens{known}")

    def _kernel(self, call: MoeCall, ids: list[int]) -> Sm90Kernel:
        generation = call.kernel.generation
        try:
            kernel = Sm90Kernel.of_profile_ids(ids, generation)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: {str(error).replace('profile_ids', 'tactics of the two GEMMs')}"
            ) from None
        for tactic, (rows, depth) in zip(kernel.tactics, call.experts.gemm_shapes, strict=True):
            if tactic not in runnable_tactics(rows, depth, generation):
                raise ValueError(
                    f"{self.path}: expected a tactic that the {generation.name} kernel can run for {rows} weight "
                    f"rows and K = {depth}, got {tactic} of {ids}"
                )
        return kernel


def token_bucket(tokens: int, most: int = 8192) -> int:
    """The number of tokens that flashinfer (0.6.10 on) tunes for in the place of this one.

    Powers of two up to 256, then multiples of 256 up to 2048, of 512 up to 4096, and powers of two again; rounded up,
    and at most `most`, the call's `tune_max_num_tokens`.

    >>> [token_bucket(tokens) for tokens in (0, 3, 257, 2049, 5000, 9000)]
    [1, 4, 512, 2560, 8192, 8192]
    """
    check_int("tokens", tokens, minimum=0)
    check_int("most", most, minimum=1)
    if tokens <= 1:
        return 1
    power = 1 << (tokens - 1).bit_length()
    if tokens <= 256:
        return min(power, most)
    for last, step in ((2048, 256), (4096, 512)):
        if tokens <= last:
            return min(-(-tokens // step) * step, most)
    return min(power, most)


def read_autotune_cache(path: Path) -> AutotuneCache:
    """Read a cache of either format.

    Args:
        path: the JSON file, or a folder that holds a v2 cache or several JSON files, at any depth.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: what is there is no cache, or has no entry of the kernel's.
    """
    if not path.exists():
        raise FileNotFoundError(f"autotune cache: there is no {path}")
    entries: list[_Entry] = []
    problems: list[str] = []
    for file in [path] if path.is_file() else (f for f in files_below(path) if f.suffix == ".json"):
        if file.name == "manifest.json" and path.is_dir():
            continue
        try:
            entries += _entries(file)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{file}: {error}")
    if not entries:
        why = f": {problems[0]}" if problems else ""
        raise ValueError(f"autotune cache: expected entries of {_OPERATIONS[0]} in {path}, found none{why}")
    return AutotuneCache(path, tuple(entries), tuple(problems))


def _entries(file: Path) -> list[_Entry]:
    """The kernel's entries in one file."""
    stored = _json_object(file)
    if set(stored) >= {"key", "runner", "tactic"}:
        manifest = file.parent.parent / "manifest.json"
        release = _json_object(manifest).get("flashinfer_version") if manifest.is_file() else ""
        pairs: Iterable[tuple[str, Any]] = [(stored["key"], stored["tactic"])]
    else:
        metadata = stored.get("_metadata")
        release = metadata.get("flashinfer_version") if isinstance(metadata, dict) else ""
        # Names with an underscore in front are no entries.
        listed = {k: v for k, v in stored.items() if not k.startswith("_")}
        if wrong := [k for k, v in listed.items() if not isinstance(v, list) or len(v) < 2]:
            raise ValueError(f"expected [runner, tactic] for each key, got {listed[wrong[0]]!r:.80}")
        pairs = [(key, value[1]) for key, value in listed.items()]
    found = []
    for key, tactic in pairs:
        fields = _key_fields(key)
        if fields is not None:
            found.append(_Entry(*fields, tactic, release if isinstance(release, str) else ""))
    return found


def _json_object(file: Path) -> dict[str, Any]:
    stored = parse_json(read_file(file))
    if not isinstance(stored, dict):
        raise ValueError(f"expected a JSON object, got {type(stored).__name__}")
    return stored


def _key_fields(key: Any) -> tuple[str, tuple[Any, ...], tuple[Any, ...]] | None:
    """Operation, shapes and further arguments of a key; None if it is not the kernel's."""
    if not isinstance(key, str) or not key.startswith(tuple(f"('{name}'" for name in _OPERATIONS)):
        return None
    try:
        fields = _literal(ast.parse(key, mode="eval").body)
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"expected the text of a tuple, got {key:.80}") from error
    match fields:
        case (str(operation), str(runner), (tuple(tokens), *others), *rest) if (
            len(tokens) == 2 and len(others) == len(_INPUTS) - 1 and len(rest) <= 1
        ):
            further = rest[0] if rest else ()
            return (operation, (tokens, *others), further) if runner == _RUNNER else None
    raise ValueError(f"expected (operation, runner, shapes of five tensors, further), got {key:.80}")


def _literal(node: ast.AST) -> Any:
    """The value of a literal, in which `torch.bfloat16` is a string; nothing is evaluated."""
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Attribute):
        return ast.unparse(node)
    return ast.literal_eval(node)


def _further(call: MoeCall, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the key of a call has after the shapes; an unset `enable_pdl` is True on every SM90."""
    dtypes = (arguments["input"].dtype, arguments["fc1_expert_weights"].dtype, arguments["output_dtype"])
    given = {**arguments, "enable_pdl": arguments["enable_pdl"] is not False}
    return (*map(str, dtypes), call.top_k, *(given[name] for name in _FURTHER))
