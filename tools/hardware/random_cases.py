"""Compare kernel and oracle on random calls that mix every option at once; needs a GPU.

Hand-picked cases miss rules that only show where options meet: here a call mixes kinds of inputs (ordinary,
mirrored, wide, tiny, infinite, NaN, any bits), kinds of scales (ordinary, over- and underflowing, any byte),
any subset of biases and of the activation's parameters, expert and tensor parallelism, padded and foreign ids, every
activation, with `--options` no routing weights and `enable_alltoall`, and every tile (by releases from 0.6.16 on;
older ones run their default tactic). A call is a function of its seed, of the activations that are drawn from and
of `--options`.

    python tools/hardware/random_cases.py --seeds 0:1000 --output random.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hardware
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from real_size import real_size_call
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward
from mxfp4ref._files import write_file
from mxfp4ref.conformance import Skip
from mxfp4ref.conformance.isolation.handing import to_device
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_kernel
from mxfp4ref.sm90.activation import ACTIVATIONS, SITU
from mxfp4ref.sm90.tactics import Sm90Kernel, runnable_tactics

Bytes = NDArray[np.uint8]


def random_call(seed: int, *, clusters: bool = False) -> MoeCall:
    """The call of a seed, on the CPU; its tactics have clusters of one CTA unless told otherwise."""
    rng = np.random.default_rng(seed)
    ep_size = int(rng.choice([1, 1, 2, 4]))
    num_local = int(rng.integers(1, 9))
    tokens = int(rng.choice([1, 2, 7, 16, 33, 64, 100, 200]))
    top_k = int(rng.integers(1, min(6, ep_size * num_local) + 1))
    hidden, inner = (int(rng.choice([128, 256, 384, 512, 1024, 1536])) for _ in range(2))
    mirrored = bool(rng.random() < 0.3)
    weights, scales = _codes(rng), _scale_bytes(rng)
    shapes = {"fc1": (num_local, 2 * inner, hidden), "fc2": (num_local, hidden, inner)}
    tensors: dict[str, Tensor] = {}
    for name, (experts, rows, depth) in shapes.items():
        packed, scale = weights((experts, rows, depth // 2)), scales((experts, rows, depth // 32))
        if mirrored and depth % 64 == 0:
            # The second half of K repeats the first; x is negated there, so that the sum is the rounding error.
            packed[..., depth // 4 :], scale[..., depth // 64 :] = (
                packed[..., : depth // 4],
                scale[..., : depth // 64],
            )
        tensors[f"{name}_weights"], tensors[f"{name}_scales"] = (
            torch.from_numpy(packed),
            torch.from_numpy(scale),
        )
    if rng.random() < 0.4:  # the real call takes both biases or none
        tensors["fc1_biases"] = _bf16(rng.normal(size=(num_local, 2 * inner)) * 2.0 ** rng.integers(-8, 4))
        tensors["fc2_biases"] = _bf16(rng.normal(size=(num_local, hidden)) * 2.0 ** rng.integers(-8, 4))
    ranges = {"swiglu_alpha": (0.5, 2.0), "swiglu_beta": (-1.0, 2.0), "swiglu_limit": (0.1, 12.0)}
    for name, (low, high) in ranges.items():
        if rng.random() < 0.4:
            tensors[name] = torch.from_numpy(rng.uniform(low, high, num_local).astype(np.float32))
    x = _inputs(rng, tokens, hidden)
    if mirrored and hidden % 64 == 0:
        x[:, hidden // 2 :] = -x[:, : hidden // 2]
    ids = np.stack([rng.permutation(ep_size * num_local)[:top_k] for _ in range(tokens)]).astype(np.int32)
    if rng.random() < 0.2:
        ids[rng.random(ids.shape) < 0.2] = -1
    if rng.random() < 0.1:
        ids[rng.random(ids.shape) < 0.1] = ep_size * num_local + 3
    final_scales = rng.random(ids.shape, dtype=np.float32) * np.float32(2.0 ** rng.integers(-3, 4))
    if rng.random() < 0.1:
        final_scales[rng.random(ids.shape) < 0.1] = rng.choice([np.nan, np.inf, 0.0, -1.0])
    tp_size = int(rng.choice([1, 2]))
    tactics = []
    for gemm, shape in enumerate(((2 * inner, hidden), (hidden, inner))):
        choices = [tactic for tactic in runnable_tactics(*shape) if tactic.cluster == (1, 1)]
        tactic = choices[int(rng.integers(len(choices)))]
        if clusters:  # drawn apart: a seed makes the same call either way
            shapes = [other for other in runnable_tactics(*shape) if other.tile == tactic.tile]
            tactic = shapes[int(np.random.default_rng((seed, gemm)).integers(len(shapes)))]
        tactics.append(tactic)
    return MoeCall(
        input=x,
        token_selected_experts=torch.from_numpy(ids),
        token_final_scales=torch.from_numpy(final_scales),
        experts=Experts(**tensors),  # type: ignore[arg-type]
        ep_size=ep_size,
        ep_rank=int(rng.integers(ep_size)),
        tp_size=tp_size,
        tp_rank=int(rng.integers(tp_size)),
        kernel=Sm90Kernel(*tactics),
        strict=False,
    )


def with_activation(
    call: MoeCall, seed: int, activations: Sequence[int], *, options: bool = False
) -> MoeCall:
    """The call with one of these activations, drawn apart from all else.

    Where Situ is one of them, any of them has any subset of Situ's parameters; older releases do not take them.
    With `options` one call in five has no routing weights; half of those with expert-parallel ranks are all-to-all.
    """
    rng = np.random.default_rng((seed, 4, *activations))
    parameters = {}
    for name, high in (("situ_beta", 8.0), ("situ_linear_beta", 30.0)):
        values = rng.uniform(0.2, high, call.experts.num_experts).astype(np.float32)
        if rng.random() < 0.2:
            values[0] = rng.choice([0.0, -1.5, np.inf, np.nan, 1e-40, 1e-38, 3e38])
        if rng.random() < 0.6 and SITU in activations:
            parameters[name] = torch.from_numpy(values).to(call.input.device)
    activation = ACTIVATIONS[int(rng.choice(list(activations)))]
    rng = np.random.default_rng((seed, 5))
    unscaled = options and bool(rng.random() < 0.2)
    experts = replace(call.experts, **parameters)
    if not activation.gated:
        experts = without_gate(experts)
    return replace(
        call,
        token_final_scales=torch.ones_like(call.token_final_scales) if unscaled else call.token_final_scales,
        experts=experts,
        kernel=call.kernel if activation.gated else _runnable(call.kernel, experts, rng),
        activation_type=activation.id,
        unscaled=unscaled,
        enable_alltoall=options and call.ep_size > 1 and bool(rng.random() < 0.5),
    )


def without_gate(experts: Experts) -> Experts:
    """The same experts for an activation that has no gate: of fc1 the second half of the rows."""
    names = ("fc1_weights", "fc1_scales", "fc1_biases")
    halves = {
        name: t.chunk(2, 1)[1].contiguous() for name in names if (t := getattr(experts, name)) is not None
    }
    return replace(experts, **halves)  # type: ignore[arg-type]


def _runnable(kernel: Sm90Kernel, experts: Experts, rng: Generator) -> Sm90Kernel:
    """The kernel, with another tactic for GEMM1 if fc1 has too few rows for its own."""
    choices = runnable_tactics(*experts.gemm_shapes[0], kernel.generation)
    if kernel.gemm1 in choices:
        return kernel
    choices = [tactic for tactic in choices if tactic.cluster == kernel.gemm1.cluster]
    return replace(kernel, gemm1=choices[int(rng.integers(len(choices)))])


def _bf16(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(torch.bfloat16)


def _inputs(rng: Generator, tokens: int, hidden: int) -> Tensor:
    shape = (tokens, hidden)
    normal = rng.normal(size=shape)
    kind = rng.choice(
        ["normal", "wide", "wider", "tiny", "huge", "special", "raw"], p=[0.25, 0.2, 0.1, 0.1, 0.1, 0.15, 0.1]
    )
    if kind == "wide":
        normal *= 2.0 ** rng.integers(-12, 12, shape)
    elif kind == "wider":
        normal *= 2.0 ** rng.integers(-60, 60, shape)
    elif kind == "tiny":
        normal *= 2.0 ** rng.integers(-134, -100, (tokens, 1))
    elif kind == "huge":
        normal *= 2.0 ** rng.integers(90, 126, (tokens, 1))
    elif kind == "raw":
        return torch.from_numpy(rng.integers(-(1 << 15), 1 << 15, shape).astype(np.int16)).view(
            torch.bfloat16
        )
    x = _bf16(normal)
    if kind == "special":
        chosen = torch.from_numpy(rng.random(shape) < 2.0 / hidden)
        values = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, 3e38], shape)
        x = torch.where(chosen, _bf16(values), x)
    return x


def _codes(rng: Generator) -> Callable[[tuple[int, ...]], Bytes]:
    sparse = rng.random() < 0.2

    def make(shape: tuple[int, ...]) -> Bytes:
        packed = rng.integers(0, 256, shape, dtype=np.uint8)
        return packed & rng.choice(np.array([0x00, 0x0F, 0x88, 0xFF], np.uint8), shape) if sparse else packed

    return make


def _scale_bytes(rng: Generator) -> Callable[[tuple[int, ...]], Bytes]:
    ranges = {
        "ordinary": (116, 124),
        "varied": (100, 135),
        "low": (0, 24),
        "high": (225, 256),
        "any": (0, 256),
    }
    low, high = ranges[str(rng.choice(list(ranges), p=[0.35, 0.2, 0.15, 0.15, 0.15]))]
    ends = rng.random() < 0.2

    def make(shape: tuple[int, ...]) -> Bytes:
        scales = rng.integers(low, high, shape).astype(np.uint8)
        if ends:
            scales[rng.random(shape) < 0.01] = rng.choice([0, 1, 254, 255])
        return scales

    return make


def main() -> int:
    names = {activation.name: id for id, activation in ACTIVATIONS.items()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:400", help="FIRST:END, the seeds to run (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop before the first seed after so long")
    parser.add_argument(
        "--cpu-every", type=int, default=20, help="run the oracle on the CPU too for every nth seed"
    )
    parser.add_argument("--clusters", action="store_true", help="clusters of several CTAs too")
    parser.add_argument(
        "--real-size", action="store_true", help="calls of DeepSeek-V4-Flash's size, on the GPU only"
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        action="extend",
        choices=list(names),
        help="draw from these (default: all)",
    )
    parser.add_argument(
        "--options", action="store_true", help="some without routing weights, some with enable_alltoall"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: the real kernel runs nowhere else")
    provenance = hardware.Provenance.of_this_machine()
    kernel = flashinfer_kernel()
    generation = kernel.generation
    activations = arguments.activations or list(names)
    first, end = (int(part) for part in arguments.seeds.split(":"))
    start = time.monotonic()
    elements = differing = cpu_elements = cpu_differing = skipped = 0
    failures: list[dict[str, object]] = []
    seed = first
    for seed in range(first, end):
        if time.monotonic() - start > arguments.seconds:
            break
        call = real_size_call(seed) if arguments.real_size else random_call(seed, clusters=arguments.clusters)
        call = with_activation(call, seed, [names[name] for name in activations], options=arguments.options)
        if not generation.forces_tactics:
            call = replace(call, kernel=Sm90Kernel(generation=generation))
        on_gpu = to_device(call, "cuda")
        try:
            launch = hardware.launcher(kernel, on_gpu)
        except Skip:
            skipped += 1
            continue
        expected = forward(on_gpu)
        cpu_expected = expected.cpu()
        expected = on_gpu.written_over(expected, torch.nan)
        got = launch()
        count = hardware.count_differences(got, expected)
        elements += got.numel()
        differing += count
        if (seed - first) % arguments.cpu_every == 0 and not arguments.real_size:
            cpu_elements += got.numel()
            cpu_differing += hardware.count_differences(forward(call), cpu_expected)
        if count:
            used = (
                [str(tactic) for tactic in call.kernel.tactics]
                if generation.forces_tactics
                else ["default", "default"]
            )
            name = call.activation.name
            failures.append(
                {
                    "seed": seed,
                    "activation": name,
                    "tactics": used,
                    "elements": got.numel(),
                    "differing": count,
                }
            )
            print(f"seed {seed}, {name}, tactics {used}: {count} of {got.numel()} differ", flush=True)
    else:
        seed = end
    result = {
        "seeds": [first, seed],
        "skipped": skipped,  # calls with an argument that this release does not have
        "elements": elements,
        "differing": differing,
        "cpu_elements": cpu_elements,
        "cpu_differing": cpu_differing,
        "default_tactic": not generation.forces_tactics,
        "clusters": arguments.clusters,
        "real_size": arguments.real_size,
        "activations": activations,
        "options": arguments.options,
        "generation": generation.recorded_as,
        "failures": failures,
        "provenance": provenance.as_dict(),
    }
    if arguments.output:
        write_file(arguments.output, json.dumps(result, indent=2) + "\n")
    seconds = time.monotonic() - start
    print(f"seeds {first}:{seed}: {elements:,} elements, {differing:,} differ; {seconds:.0f} s")
    print(f"oracle on CPU against GPU: {cpu_elements:,} elements, {cpu_differing:,} differ")
    return 0 if differing == 0 and cpu_differing == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
