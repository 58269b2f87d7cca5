"""Compare the W4A8 ("Humming") kernel and its oracle on random and designed calls; needs a GPU.

The calls are those of `random_cases.py`, which mix every option and activation, with their weights prepared for W4A8;
some have raw offsets and residuals that no preparation makes. A call is a function of its seed, of the dtype and of
the activations that are drawn from. Each runs with two tactics of the build at hand. The designed ones
put one question each: the reciprocal of every bf16 row maximum, NaN and Inf in a row, rows of tiny and huge numbers,
sums that cancel over K = 128, 256 and 512. The golden calls of that dtype run too. The oracle runs in processes of
its own while the GPU goes on.

    python tools/hardware/humming_cases.py --seeds 0:300 --seconds 400 --output DIR
    python tools/hardware/humming_cases.py --dtype float16 --seeds 0:300 --seconds 400 --output DIR

`--dtype float16` needs a build of that path (`build_kernel.py --paths w4a8-fp16`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hardware
import numpy as np
import torch
from random_cases import random_call, with_activation
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref._files import write_file
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_w4a8_kernel
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.model.humming import call_of, inputs_of
from mxfp4ref.sm90.activation import ACTIVATIONS

DESIGNED_TOKENS = 256
OPTIONS = (
    "ep_size",
    "ep_rank",
    "tp_size",
    "tp_rank",
    "strict",
    "activation_type",
    "unscaled",
    "enable_alltoall",
)
NAMES = {activation.name: id for id, activation in ACTIVATIONS.items()}


class Kind(NamedTuple):
    """What besides a key says which call it is."""

    dtype: torch.dtype
    activations: tuple[int, ...]


def humming_call(seed: int, of: Kind) -> MoeCall:
    """The random call of a seed with its experts prepared for W4A8, or with raw offsets or residuals."""
    call = with_activation(random_call(seed), seed, of.activations, options=True)
    rng = np.random.default_rng((seed, 8))
    experts = HummingExperts.prepare(call.experts)
    kind = rng.choice(["prepared", "raw offsets", "any bytes", "raw residuals"], p=[0.7, 0.1, 0.1, 0.1])
    if kind in ("raw offsets", "any bytes"):
        high = 13 if kind == "raw offsets" else 256

        def offsets(like: Tensor) -> Tensor:
            return torch.from_numpy(rng.integers(0, high, tuple(like.shape)).astype(np.uint8))

        assert experts.fc1_scales is not None
        assert experts.fc2_scales is not None
        changed = {"fc1_scales": offsets(experts.fc1_scales), "fc2_scales": offsets(experts.fc2_scales)}
        experts = replace(experts, **changed)
    if kind != "prepared":
        shape = experts.num_experts
        values = rng.normal(size=(2, shape)) * 2.0 ** rng.integers(-20, 20, (2, shape))
        if kind == "raw residuals":
            values = np.where(
                rng.random(values.shape) < 0.2, rng.choice([0, np.inf, np.nan, 1e-40], values.shape), values
            )
        fc1, fc2 = torch.from_numpy(values.astype(np.float32))
        experts = replace(experts, fc1_residual=fc1.clone(), fc2_residual=fc2.clone())
    call = replace(call, experts=experts)
    return call if of.dtype == torch.bfloat16 else in_fp16(call, any_bits=bool(rng.random() < 0.4))


def in_fp16(call: MoeCall, *, any_bits: bool = False) -> MoeCall:
    """The call with input and biases in fp16: their numbers or, with `any_bits`, of the input the same bits."""
    x = call.input.view(torch.float16) if any_bits else call.input.to(torch.float16)
    biases = {name: getattr(call.experts, name) for name in ("fc1_biases", "fc2_biases")}
    halves = {name: None if bias is None else bias.to(torch.float16) for name, bias in biases.items()}
    return replace(call, input=x, experts=replace(call.experts, **halves))


def designed_call(name: str, dtype: torch.dtype) -> MoeCall:
    """The call that puts a question; one expert, so that every row is one token."""
    rng = np.random.default_rng(len(name))
    kind, _, depth_text = name.partition(" ")
    depth = int(depth_text or 256)
    half = dtype == torch.float16
    fractions = 1024 if half else 128
    tokens, inner = 2 * fractions if kind == "maximum" else DESIGNED_TOKENS, depth
    x = torch.from_numpy(rng.normal(size=(tokens, depth)))
    rows = torch.arange(tokens)
    if kind == "maximum":  # every fraction of a maximum, each with two exponents
        x = x.clamp(-0.99, 0.99)
        x[:, 3] = torch.ldexp(1 + (rows % fractions) / fractions, rows // fractions)
    elif kind == "special":  # one NaN, Inf or largest number a row
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.38e38, -3.38e38, 1e-39, -0.0, 0.0])
        x[rows, rows % depth] = values[rows % 8].double()
        x[rows % 16 >= 8] *= 0
        x[rows, rows % depth] = values[rows % 8].double()
    elif kind == "tiny":  # maxima from the least subnormal to above the least that 448 can be divided by
        x = torch.ldexp(x / x.abs().amax(1, keepdim=True), (-25 if half else -134) + (rows % 32)[:, None])
    elif kind == "huge":
        x = torch.ldexp(x / x.abs().amax(1, keepdim=True), (9 if half else 120) + (rows % 8)[:, None])
    elif kind == "cancel":  # the second half of K takes the first back: what is left are truncations
        x = torch.ldexp(x, torch.from_numpy(rng.integers(-9, 1, tuple(x.shape))))
        x[:, depth // 2 :] = -x[:, : depth // 2]
    packed = [
        rng.integers(0, 256, (1, rows_, depth_ // 2))
        for rows_, depth_ in ((2 * inner, depth), (depth, inner))
    ]
    scales = [
        rng.integers(114, 126, (1, rows_, depth_ // 32))
        for rows_, depth_ in ((2 * inner, depth), (depth, inner))
    ]
    if kind == "cancel":
        packed[0][..., depth // 4 :] = packed[0][..., : depth // 4]
        scales[0][..., depth // 64 :] = scales[0][..., : depth // 64]
    tensors = [
        torch.from_numpy(array.astype(np.uint8))
        for pair in zip(packed, scales, strict=True)
        for array in pair
    ]
    from mxfp4ref import Experts

    return MoeCall(
        x.to(dtype),
        torch.zeros(tokens, 1, dtype=torch.int32),
        torch.ones(tokens, 1),
        HummingExperts.prepare(Experts(*tensors)),
    )


DESIGNED = (
    "maximum", "special", "tiny", "huge",
    "cancel 128", "cancel 256", "cancel 512", "cancel 1024", "plain 128", "plain 512",
)  # fmt: skip


def call_for(key: int | str, of: Kind) -> MoeCall:
    """A designed call by its name, a golden one by `suite/name`, a random one by its seed."""
    if isinstance(key, int):
        return humming_call(key, of)
    return call_of(runs(open_goldens().load(key))[0].inputs) if "/" in key else designed_call(key, of.dtype)


def golden_calls(dtype: torch.dtype) -> list[str]:
    cases = (goldens.load(name) for goldens in [open_goldens()] for name in goldens.names())
    return [case.id for case in cases if case.kind == "w4a8" and case.tensors["input"].dtype == dtype]


def oracle(key: int | str, of: Kind) -> np.ndarray[Any, Any]:
    """In a process of its own."""
    torch.set_num_threads(1)
    call = call_for(key, of)
    result: np.ndarray[Any, Any] = call.written_over(forward(call), torch.nan).view(torch.int16).numpy()
    return result


class Kernel:
    """flashinfer's function, and which tactics this build has."""

    def __init__(self) -> None:
        import flashinfer.jit.fused_moe as jit

        self._kernel, self._jit = flashinfer_w4a8_kernel(), jit
        self._tactics_of: dict[torch.dtype, Any] = {}
        self._present: set[int] = set()
        self._absent: set[int] = set()
        self.used: Counter[int] = Counter()

    def prepare(self, call: MoeCall) -> dict[str, Any]:
        """The arguments of flashinfer's function, on the GPU."""
        inputs = {name: tensor.cuda() for name, tensor in inputs_of(call).items()}
        _, arguments = self._kernel.prepare("w4a8", inputs | {name: getattr(call, name) for name in OPTIONS})
        return arguments

    def run(self, arguments: dict[str, Any], tactics: list[int]) -> Tensor:
        arguments["output"].fill_(torch.nan)
        self._kernel.function(**arguments, profile_ids=tactics)
        output: Tensor = arguments["output"]
        return output.clone()

    def tactics(self, call: MoeCall, arguments: dict[str, Any], rng: np.random.Generator) -> list[int]:
        """A pair of tactics that this build has and the call can run with.

        A trimmed build fails where it lacks one, its default too: which of two is told by the other, if that has run.
        """
        runner = self._runner(call.input.dtype)
        valid = [
            {int(tactic) for tactic in runner.get_valid_tactics_for_shape(gemm, *shape)} - self._absent
            for gemm, shape in enumerate(call.experts.gemm_shapes, 1)
        ]
        while True:
            chosen = []
            for tactics in valid:
                seen, unseen = tactics & self._present, tactics - self._present
                chosen.append(
                    int(rng.choice(sorted(seen if seen and rng.random() < 0.7 else unseen or seen)))
                )
            try:
                self.run(arguments, chosen)
            except Exception as error:  # whatever the build throws where it lacks a tactic
                if "trimmed" not in str(error) and "undefined symbol" not in str(error):
                    print(f"tactics {chosen}: {str(error)[:200]}")
                unseen = set(chosen) - self._present
                if len(unseen) == 1:
                    self._absent |= unseen
                    valid = [tactics - unseen for tactics in valid]
                continue
            self._present.update(chosen)
            return chosen

    def default(self, call: MoeCall, arguments: dict[str, Any], rng: np.random.Generator) -> list[int]:
        """What the kernel runs if it is told nothing, or another pair where the build lacks that."""
        try:
            self.run(arguments, [-1, -1])
        except RuntimeError:
            return self.tactics(call, arguments, rng)
        return [-1, -1]

    def _runner(self, dtype: torch.dtype) -> Any:
        if dtype not in self._tactics_of:
            library = self._jit.gen_cutlass_fused_moe_sm90_module().build_and_load()
            options = (False, True, False, False, True, True)
            self._tactics_of[dtype] = library.init(dtype, torch.uint8, dtype, *options)
        return self._tactics_of[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:200", help="FIRST:END (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop before the first seed after so long")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder for the result and for what differs"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of input, biases and output"
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=list(NAMES),
        default=list(NAMES),
        help="draw from these (default: all)",
    )
    parser.add_argument("--no-designed", action="store_true", help="random calls only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: the real kernel runs nowhere else")
    of = Kind(getattr(torch, arguments.dtype), tuple(NAMES[name] for name in arguments.activations))
    arguments.output.mkdir(parents=True, exist_ok=True)
    first, end = (int(part) for part in arguments.seeds.split(":"))
    keys: list[int | str] = [
        *([] if arguments.no_designed else [*DESIGNED, *golden_calls(of.dtype)]),
        *range(first, end),
    ]
    oracle("plain 128", of)  # compiles the loops before other processes want them
    kernel = Kernel()
    start = time.monotonic()
    results: list[dict[str, Any]] = []
    kept = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        expected: dict[int | str, Future[np.ndarray[Any, Any]]] = {}
        outputs: dict[int | str, list[tuple[list[int], np.ndarray[Any, Any]]]] = {}

        def settle(key: int | str) -> None:
            nonlocal kept
            want = expected.pop(key).result()
            for tactics, got in outputs.pop(key):
                differing = int((got != want).sum())
                results.append({"key": key, "tactics": tactics, "elements": got.size, "differing": differing})
                if differing and kept < 12:
                    kept += 1
                    np.savez_compressed(
                        arguments.output / f"{key}_{kept}.npz", got=got, want=want, tactics=tactics
                    )

        for key in keys:
            if time.monotonic() - start > arguments.seconds:
                break
            call = call_for(key, of)
            rng = np.random.default_rng((zlib.crc32(str(key).encode()), 9))
            prepared = kernel.prepare(call)
            expected[key] = pool.submit(oracle, key, of)
            outputs[key] = []
            for number in range(2):
                choose = kernel.tactics if number or not isinstance(key, str) else kernel.default
                tactics = choose(call, prepared, rng)
                got = kernel.run(prepared, tactics).view(torch.int16).cpu().numpy()
                outputs[key].append((tactics, got))
                kernel.used.update(tactics)
            for done in [other for other, future in expected.items() if future.done()]:
                settle(done)
        for key in list(expected):
            settle(key)
    record = {
        "path": "W4A8" if of.dtype == torch.bfloat16 else "W4A8 in fp16",
        "activations": arguments.activations,
    }
    record |= {"provenance": hardware.Provenance.of_this_machine().as_dict()}
    report(results, kernel.used, arguments.output, record)
    return 0 if not any(result["differing"] for result in results) else 1


def report(
    results: list[dict[str, Any]], used: Mapping[int, int], output: Path, record: dict[str, Any]
) -> None:
    """Print a table of what differs, and write a record of all of it."""
    record["tactics"] = dict(sorted(used.items()))
    for key in dict.fromkeys(result["key"] if isinstance(result["key"], str) else "" for result in results):
        some = [
            result for result in results if (result["key"] == key if key else isinstance(result["key"], int))
        ]
        elements, differing = (sum(result[field] for result in some) for field in ("elements", "differing"))
        print(
            f"{key or 'random':14s} {len(some):5d} runs {elements:13,d} elements {differing:11,d} differing"
        )
        if key:
            record[f"{record['path']}, {key}"] = {
                "compared": elements,
                "differing": differing,
                "runs": len(some),
            }
            continue
        seeds = [result["key"] for result in some]
        failures = [result for result in some if result["differing"]]
        print(*failures[:12], sep="\n")
        record |= {"seeds": [min(seeds), max(seeds) + 1], "elements": elements, "differing": differing}
        record["failures"] = failures
    provenance = record["provenance"]
    slug = "-".join(
        [*provenance["gpu"].lower().removeprefix("nvidia ").split(), "flashinfer", provenance["flashinfer"]]
    )
    write_file(
        output / f"{slug}-random-{record['path'].lower().replace(' ', '-')}.json",
        json.dumps(record, indent=2) + "\n",
    )


if __name__ == "__main__":
    sys.exit(main())
