"""Let flashinfer record calls of its kernel as a server would make them, for `mxfp4ref replay`; needs a GPU.

    python tools/hardware/record_calls.py OUT [--tokens 1 16 4096]

A small layer is called with each number of tokens: eagerly, eagerly after autotuning in flashinfer's two ways, and in
CUDA graphs that are replayed with other inputs in the same buffers. Half of K of the inputs nearly
cancels the other half, so that the order in which the groups are added up shows. flashinfer's own recorder writes

    OUT/eager, OUT/autotuned, OUT/autotuned_v2, OUT/graph     the recordings
    OUT/autotune.json, OUT/autotune_v2                        what the autotuner keeps, where the release keeps it

Tuned over are the tactics that `build_kernel.py` builds, those whose clusters are single thread blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import quantize
from mxfp4ref.formats.generations import generation_of
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90

HIDDEN, INNER, EXPERTS, TOP_K = 768, 128, 2, 2
WAYS = ("eager", "autotuned", "autotuned_v2", "graph")


def recorder_settings(folder: Path) -> dict[str, str]:
    """What a user of flashinfer's recorder sets."""
    return {
        "FLASHINFER_LOGLEVEL": "10",
        "FLASHINFER_LOGDEST": str(folder) + ".log",
        "FLASHINFER_DUMP_INCLUDE": "*cutlass_fused_moe*",
        "FLASHINFER_DUMP_SAFETENSORS": "1",
        "FLASHINFER_DUMP_DIR": str(folder),
    }


def random_call(tokens: int, device: str = "cuda") -> dict[str, Tensor]:
    """Input, ids and routing weights; every call draws others."""
    half = torch.randn(tokens, HIDDEN // 2, device=device) * 2.0 ** torch.randint(
        -6, 6, (tokens, 1), device=device
    )
    ids = torch.stack([torch.randperm(EXPERTS, device=device)[:TOP_K] for _ in range(tokens)])
    other = -half * (1 + torch.randn_like(half) / 32)
    return {
        "input": torch.cat([half, other], 1).to(torch.bfloat16),
        "token_selected_experts": ids.to(torch.int32),
        "token_final_scales": torch.rand(tokens, TOP_K, device=device),
    }


def layer(release: str) -> dict[str, Any]:
    """The experts in the layouts of a release; the second half of K repeats the first."""
    generation, named = generation_of(release), {}
    scales = []
    for name, rows, depth in (("fc1", 2 * INNER, HIDDEN), ("fc2", HIDDEN, INNER)):
        packed, scale = quantize(
            torch.randn(EXPERTS, rows, depth // 2, generator=torch.Generator().manual_seed(rows))
        )
        packed, scale = torch.cat([packed, packed], 2), torch.cat([scale, scale], 2)
        named[f"{name}_expert_weights"] = interleave_weights_sm90(packed, generation).cuda()
        scales.append(fold_scales_sm90(scale, generation).view(torch.int32).cuda())
    return {**named, "output_dtype": torch.bfloat16, "quant_scales": scales, "use_w4_group_scaling": True}


def record(way: str, out: Path, token_counts: list[int]) -> None:
    """In a process whose environment has the recorder's settings."""
    flashinfer: Any = importlib.import_module("flashinfer")
    fused_moe: Any = importlib.import_module("flashinfer.fused_moe")
    torch.manual_seed(WAYS.index(way))
    experts = layer(flashinfer.__version__)

    def call(arguments: dict[str, Tensor]) -> Tensor:
        result: Tensor = fused_moe.cutlass_fused_moe(**arguments, **experts)[0]
        return result

    for tokens in token_counts:
        arguments = random_call(tokens)
        if way == "graph":
            with not_recorded():
                call(arguments)  # what a first call sets up cannot be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(arguments)
            for _ in range(2):
                for name, tensor in random_call(tokens).items():
                    arguments[name].copy_(tensor)
                graph.replay()
            torch.cuda.synchronize()
        else:
            if way != "eager":
                with not_recorded():
                    call(arguments)  # the runner's class is made by a first call
                    with only_what_was_built(), tuner(flashinfer, way, out):
                        call(arguments)
            call(arguments)
    torch.cuda.synchronize()


@contextlib.contextmanager
def not_recorded() -> Iterator[None]:
    """The recorder reads how many calls it may still record at each call."""
    logging: Any = importlib.import_module("flashinfer.api_logging")
    limit, logging._DUMP_MAX_COUNT = logging._DUMP_MAX_COUNT, 0
    try:
        yield
    finally:
        logging._DUMP_MAX_COUNT = limit


def tuner(flashinfer: Any, way: str, out: Path) -> Any:
    """One of flashinfer's two ways to tune."""
    if way == "autotuned":
        return flashinfer.autotune(True, cache=str(out / "autotune.json"))
    managed: Any = importlib.import_module("flashinfer.autotune_cache")
    return managed.autotune_v2(cache_root=str(out / "autotune_v2"))


@contextlib.contextmanager
def only_what_was_built() -> Iterator[None]:
    """Tune over the tactics whose cluster is one CTA, every fourth id, without the module that delays a stream."""
    tuning: Any = importlib.import_module("flashinfer.autotuner.autotuner")
    tuning.delay_kernel = lambda microseconds: None
    runners: list[type] = [tuning.TunableRunner]
    for runner in runners:
        runners += runner.__subclasses__()
    kept = {
        runner: runner.__dict__["get_valid_tactics"]
        for runner in runners
        if "get_valid_tactics" in runner.__dict__
    }

    def some(function: Any) -> Any:
        return lambda *arguments: [tactic for tactic in function(*arguments) if tactic % 4 == 0]

    for runner, function in kept.items():
        runner.get_valid_tactics = some(function)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for runner, function in kept.items():
            runner.get_valid_tactics = function  # type: ignore[attr-defined]


_TOKENS = [1, 2, 7, 16, 64, 257, 1024, 4096]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokens", type=int, nargs="+", action="extend", help=f"default: {_TOKENS}")
    parser.add_argument("--way", choices=WAYS, action="append", help="only this one; repeatable")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: the real kernel runs nowhere else")
    tokens = arguments.tokens or _TOKENS
    ways = arguments.way or list(WAYS)
    if arguments.in_this_process:
        record(ways[0], arguments.out, tokens)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for way in ways:
        command = [
            sys.executable,
            __file__,
            str(arguments.out),
            "--way",
            way,
            "--in-this-process",
            "--tokens",
        ]
        environment = os.environ | recorder_settings(arguments.out / way)
        done = subprocess.run([*command, *map(str, tokens)], env=environment, check=False)
        print(f"{way}: {'recorded' if done.returncode == 0 else f'FAILED with exit code {done.returncode}'}")
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
