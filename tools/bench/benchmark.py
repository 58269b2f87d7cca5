"""Time and memory of what people call, beside what they use today. How the numbers came about: `benchmark.md`.

    python tools/bench/benchmark.py                 every table on the CPU; a few minutes on two idle cores
    python tools/bench/benchmark.py --cuda          every table on a GPU, with the real kernel if flashinfer is there
    python tools/bench/benchmark.py --only formats  one table; repeatable
    python tools/bench/benchmark.py --quick         tiny sizes: that everything runs, no more

What is compared takes turns in one process. A time is the median of the turns, after one that does not count; a ratio
is that time divided by the time of the first line of its kind; memory is the peak above what was in use before.

Leave OMP_WAIT_POLICY unset and the machine idle. On a busy one torch's threads wait for each other at every
operation, the compiled loops hardly do, and the ratios flatter the drop-in.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peers
import torch

from mxfp4ref import MoeCall, dequantize, quantize
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_kernel
from mxfp4ref.formats import layout

MIB = 1 << 20
Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V4-Flash's layer, on a CPU with fewer experts."""

    device: str = "cpu"
    hidden: int = 4096
    inner: int = 2048
    experts: int = 32
    top_k: int = 6
    tokens: tuple[int, ...] = (1, 8, 64)
    turns: int = 5


CUDA = Sizes("cuda", experts=256, tokens=(1, 8, 64, 512, 4096))

# Device, table, cases, and what these keep to; the first line that fits a case counts. CPU: two cores.
TARGETS = (
    ("cpu", "layer", "*drop-in", "MiB <= 100"),
    ("cpu", "layer", "M = 1, *tests", "ratio >= 30"),
    ("cpu", "layer", "M = 8, *tests", "ratio >= 22"),
    ("cpu", "layer", "M = 64, *tests", "ratio >= 8"),
    ("cpu", "layer", "M = 64, *fastest", "ratio >= 1"),
    ("cpu", "layer", "*fastest", "ratio >= 1.5"),
    ("cpu", "small", "*drop-in", "ms <= 3"),
    ("cpu", "hard", "easy*", "MiB <= 100"),
    ("cpu", "hard", "*", "ratio <= 2.5, MiB <= 100"),
    ("cpu", "formats", "dequantize, into place", "ratio <= 2"),
    ("cpu", "formats", "dequantize", "MiB <= 35.2"),  # 1.1 of the output
    ("cuda", "layer", "*drop-in", "ratio <= 8, MiB <= 1024"),
)


@dataclass(frozen=True)
class Row:
    """One measurement; None is what cannot be measured, or has nothing to be compared with."""

    case: str
    ms: float
    ratio: float | None
    MiB: float | None


def target_of(device: str, table: str, case: str) -> str:
    for on, of, cases, target in TARGETS:
        if (on, of) == (device, table) and fnmatchcase(case, cases):
            return target
    return ""


def verdicts(row: Row, target: str) -> list[str]:
    """Whether a row keeps to each part of its target."""
    found = []
    for part in filter(None, target.split(", ")):
        name, sign, limit = part.split()
        value = getattr(row, name)
        keeps = {"<=": operator.le, ">=": operator.ge}[sign]
        found.append("not measured" if value is None else "met" if keeps(value, float(limit)) else "MISSED")
    return found


def measured(sizes: Sizes, candidates: dict[str, Run], prefix: str = "") -> Iterator[Row]:
    """A row for each candidate; ratios are to the first."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(sizes.turns + 1):
        for name, run in candidates.items():
            taken = milliseconds(run, sizes.device)
            if turn:
                times[name].append(taken)
    first: float | None = None
    for name, run in candidates.items():
        median = statistics.median(times[name])
        yield Row(prefix + name, median, median / first if first else None, peak_mib(run, sizes.device))
        first = first or median


def milliseconds(run: Run, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    before = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - before)


def peak_mib(run: Run, device: str) -> float | None:
    """The most memory that a run needs above what is in use before; None where the system cannot tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # Linux keeps the highest resident size and starts anew on request; pages that malloc holds back would hide.
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident_kib("VmRSS")
    run()
    return (resident_kib("VmHWM") - before) / 1024


def resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def layer(sizes: Sizes) -> Iterator[Row]:
    """The drop-in at DeepSeek-V4-Flash's size, beside the approximate references and the real kernel."""
    experts = peers.random_experts(sizes.experts, sizes.hidden, sizes.inner, sizes.device)
    tensors = peers.interleaved(experts)
    for tokens in sizes.tokens:
        call = peers.random_call(experts, tokens, sizes.top_k)
        on_cpu: dict[str, Run] = {"drop-in": peers.drop_in(call, tensors)}
        candidates = on_gpu(call, tensors) if sizes.device == "cuda" else on_cpu
        yield from measured(sizes, candidates | peers.approximations(call), f"M = {tokens}, ")


real_kernel = functools.cache(flashinfer_kernel)  # one, which brings the weights into its layouts once


def on_gpu(call: MoeCall, tensors: dict[str, Any]) -> dict[str, Run]:
    """The real kernel, if it is there, and the drop-in: as it is, without the check of ids, and in a CUDA graph."""
    candidates: dict[str, Run] = {}
    drop_in, unchecked = peers.drop_in(call, tensors), peers.drop_in(call, tensors, strict=False)
    if importlib.util.find_spec("flashinfer") is not None:
        kernel = real_kernel()
        positional, keywords = kernel.prepare("moe", call)
        candidates["real kernel"] = lambda: kernel.function(*positional, **keywords)
        candidates["real kernel"]()
        if not torch.equal(keywords["output"].view(torch.int16), drop_in().view(torch.int16)):
            raise RuntimeError("the drop-in and the kernel give different bits")
    unchecked()  # what a first call compiles cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unchecked()
    runs = {"drop-in": drop_in, "drop-in, strict=False": unchecked, "replay of a CUDA graph": graph.replay}
    return candidates | runs


def small(sizes: Sizes) -> Iterator[Row]:
    """A layer so small that the overhead of a call shows: H 256, I 128, 8 experts, top 2."""
    experts = peers.random_experts(8, 256, 128, sizes.device)
    tensors = peers.interleaved(experts)
    for tokens in sizes.tokens[:3]:
        call = peers.random_call(experts, tokens, 2)
        candidates = {"drop-in": peers.drop_in(call, tensors), **peers.approximations(call)}
        yield from measured(sizes, candidates, f"M = {tokens}, ")


def hard(sizes: Sizes) -> Iterator[Row]:
    """The drop-in on inputs that are hard on a GEMM, beside easy ones: 8 experts, top 2, half of H and I."""
    shape = (8, sizes.hidden // 2, sizes.inner // 2, sizes.device)
    experts = peers.random_experts(*shape)
    easy = peers.random_call(experts, 32, 2)
    x = easy.input
    generator = torch.Generator(sizes.device).manual_seed(3)

    def spread(most: int) -> torch.Tensor:
        exponents = torch.randint(-most, most + 1, x.shape, generator=generator, device=sizes.device)
        return torch.ldexp(x.float(), exponents).to(torch.bfloat16)

    def with_two_in_a_token(value: float) -> torch.Tensor:
        chosen = torch.rand(x.shape, generator=generator, device=sizes.device) < 2 / x.shape[1]
        return x.masked_fill(chosen, value)

    first_half = x[:, : x.shape[1] // 2]
    tensors = peers.interleaved(experts)
    candidates: dict[str, Run] = {
        name: peers.drop_in(replace(easy, input=value), tensors)
        for name, value in {
            "easy: normally distributed": x,
            "second half of K cancels the first": torch.cat([first_half, -first_half], 1),
            "exponents over 2^+-12": spread(12),
            "exponents over 2^+-60": spread(60),
            "two Inf in a token": with_two_in_a_token(torch.inf),
            "two NaN in a token": with_two_in_a_token(torch.nan),
            "near the end of float32's range": torch.full_like(x, 3e38),
        }.items()
    }
    for low, high in ((0, 24), (225, 256)):
        extreme = peers.interleaved(peers.random_experts(*shape, scales=(low, high)))
        candidates[f"scale bytes {low} to {high - 1}"] = peers.drop_in(easy, extreme)
    yield from measured(sizes, candidates)


def formats(sizes: Sizes) -> Iterator[Row]:
    """Formats and layouts; ratios are to a copy, into new memory if that is what the function does too."""
    values = torch.randn(sizes.hidden, sizes.hidden, device=sizes.device).to(torch.bfloat16)
    packed, scales = quantize(values)
    out = torch.empty_like(values)
    experts = peers.random_experts(8, sizes.hidden, sizes.inner, sizes.device)
    weights, groups = experts.fc1_weights, experts.fc1_scales
    assert groups is not None
    interleaved, folded = layout.interleave_weights_sm90(weights), layout.fold_scales_sm90(groups)
    for name, larger, run in (
        ("dequantize, into place", out, lambda: dequantize(packed, scales, out=out)),
        ("dequantize", values, lambda: dequantize(packed, scales)),
        ("dequantize as flashinfer's tests do", values, lambda: peers.dequantize(packed, scales)),
        ("quantize", values, lambda: quantize(values)),
        ("interleave_weights_sm90", weights, lambda: layout.interleave_weights_sm90(weights)),
        ("deinterleave_weights_sm90", weights, lambda: layout.deinterleave_weights_sm90(interleaved)),
        ("fold_scales_sm90", groups, lambda: layout.fold_scales_sm90(groups)),
        ("unfold_scales_sm90", groups, lambda: layout.unfold_scales_sm90(folded)),
    ):
        copy = functools.partial(larger.clone().copy_, larger) if "into place" in name else larger.clone
        _, row = measured(sizes, {"copy": copy, name: run})
        yield row


TABLES: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "layer": layer,
    "small": small,
    "hard": hard,
    "formats": formats,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TABLES, action="append", help="only this table; repeatable")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn, no targets")
    parser.add_argument("--turns", type=int, help="turns whose median counts (default 5)")
    options = parser.parse_args(arguments)
    if options.cuda and not torch.cuda.is_available():
        parser.error("--cuda: torch sees no GPU here")
    sizes = CUDA if options.cuda else Sizes()
    if options.quick:
        sizes = replace(sizes, hidden=512, inner=512, experts=8, top_k=2, turns=1)
    if options.turns is not None:
        sizes = replace(sizes, turns=options.turns)
    where = torch.cuda.get_device_name() if options.cuda else f"{torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    load = os.getloadavg()[0]
    busy = (
        " (BUSY: do not quote these numbers)"
        if load > (os.cpu_count() or 1) / 2 and not options.quick
        else ""
    )
    print(f"{versions}, {platform.machine()}, {where}, load before {load:.1f}{busy}")
    found: list[str] = []
    for table in options.only or TABLES:
        print(f"\n## {table}\n\n{TABLES[table].__doc__}\n")
        print("| case | ms | ratio | peak MiB | target | |\n|---|--:|--:|--:|---|---|")
        for row in TABLES[table](sizes):
            target = "" if options.quick else target_of(sizes.device, table, row.case)
            met = verdicts(row, target)
            ratio, peak = ("" if v is None else f"{v:.{n}f}" for v, n in ((row.ratio, 2), (row.MiB, 0)))
            cells = (row.case, f"{row.ms:.2f}", ratio, peak, target, ", ".join(met))
            print(f"| {' | '.join(cells)} |", flush=True)
            found += met
    print(f"\n{found.count('met')} of {len(found)} targets met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
