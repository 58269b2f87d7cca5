"""Time and memory of the oracle beside what people use today, as ratios and as growth.

    python tools/bench/benchmark.py                   every table; about ten minutes on two idle cores
    python tools/bench/benchmark.py --quick           tiny sizes: that everything runs, no more
    python tools/bench/benchmark.py --only forward    one section
    python tools/bench/benchmark.py --cuda            the oracle on a GPU, and the real kernel if flashinfer is there

What is compared takes turns in one process; a time is the median of the turns, a ratio that of two medians.
Tables are Markdown; `--json FILE` has the same rows. How the numbers came about: `benchmark.md`.

Leave OMP_WAIT_POLICY unset and the machine idle: PASSIVE costs a system call for every small operation, and ACTIVE
lets the threads of torch and of its BLAS spin against each other. Either halves the speed of the oracle.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import peers
import torch
from torch import Tensor

from mxfp4ref import MoeCall, dequantize, forward

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """H, I, E, k and M of the tables; DeepSeek-V4-Flash's by default."""

    hidden: int = 4096
    inner: int = 2048
    experts: int = 32
    top_k: int = 6
    tokens: tuple[int, ...] = (8, 64)
    grown: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)  # numbers of tokens
    steps: int = 3  # doublings of E, H and I
    turns: int = 5


QUICK = Sizes(hidden=512, inner=512, experts=8, top_k=2, tokens=(2, 4), grown=(1, 4), steps=1, turns=1)


@dataclass(frozen=True)
class Row:
    """One measurement. `ratio` and `target` speak of what `of` says; the peak is above the inputs."""

    section: str
    case: str
    milliseconds: float
    ratio: float | None = None
    of: str = ""
    peak_mib: float | None = None
    target: str = ""
    met: bool | None = None


def seconds(turns: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """The median time of each candidate; they take turns after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_mib(run: Callable[[], object], device: str = "cpu") -> float | None:
    """Memory that a run needs at its peak above what is in use before; None where the system cannot tell."""
    if device == "cuda":
        torch.cuda.synchronize()
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
    before_kib = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before_kib) / 1024


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def dequantize_rows(sizes: Sizes) -> Iterator[Row]:
    """One weight matrix to bf16, beside a plain copy of the result."""
    shape = (sizes.hidden, sizes.hidden)
    experts = peers.random_experts(1, sizes.hidden, sizes.hidden // 2)
    packed, scales = experts.fc1_weights[0], experts.fc1_scales[0]  # type: ignore[index]
    source, out = torch.ones(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)
    output_mib = 2 * out.numel() / MIB
    candidates = {
        "copy_": lambda: out.copy_(source),
        "mxfp4ref": lambda: dequantize(packed, scales, out=out),
        "as in flashinfer's tests": lambda: peers.dequantize(packed, scales),
    }
    times = seconds(4 * sizes.turns, **candidates)
    candidates["mxfp4ref"] = lambda: dequantize(packed, scales)  # a new output, so that it counts
    for name, taken in times.items():
        peak = None if name == "copy_" else peak_mib(candidates[name])
        row = Row("dequantize", name, 1e3 * taken, taken / times["copy_"], "copy_", peak)
        if name == "mxfp4ref":
            met = row.ratio <= 1.5 and (peak is None or peak <= 1.2 * output_mib)  # type: ignore[operator]
            row = replace(row, target=f"<= 1.5, {1.2 * output_mib:.0f} MiB", met=met)
        yield row


def forward_rows(sizes: Sizes) -> Iterator[Row]:
    """The layer at DeepSeek-V4-Flash's size, beside the approximate reference."""
    experts = peers.random_experts(sizes.experts, sizes.hidden, sizes.inner)
    for tokens in sizes.tokens:
        call = peers.random_call(experts, tokens, sizes.top_k)
        exact, approximate = (lambda call=call: forward(call)), (lambda call=call: peers.moe(call))
        times = seconds(sizes.turns, exact=exact, approximate=approximate)
        faster = times["approximate"] / times["exact"]
        peak = peak_mib(exact)
        yield Row(
            "forward",
            f"{tokens} tokens, exact",
            1e3 * times["exact"],
            faster,
            "times as fast as the approximate",
            peak,
            ">= 2, 300 MiB",
            faster >= 2 and (peak is None or peak <= 300),
        )
        yield Row(
            "forward",
            f"{tokens} tokens, approximate",
            1e3 * times["approximate"],
            peak_mib=peak_mib(approximate),
        )


def growth_rows(sizes: Sizes) -> Iterator[Row]:
    """One size grown at a time, and the threads. A ratio above the growth of the size itself is a cliff."""
    hidden, inner, tokens = sizes.hidden // 4, sizes.inner // 4, 32
    num_experts, top_k = max(2, sizes.experts // 4), min(2, sizes.top_k)
    experts = peers.random_experts(num_experts, hidden, inner)

    def grow(name: str, calls: dict[int, MoeCall]) -> Iterator[Row]:
        before: Row | None = None
        for value, call in calls.items():
            run = lambda call=call: forward(call)  # noqa: E731
            taken = 1e3 * seconds(sizes.turns, run=run)["run"]
            row = Row(f"growth in {name}", f"{name} = {value}", taken, peak_mib=peak_mib(run))
            if before is not None:
                row = replace(row, ratio=taken / before.milliseconds, of="times " + before.case)
            yield row
            before = row

    doubled = [1 << step for step in range(sizes.steps + 1)]
    yield from grow("M", {m: peers.random_call(experts, m, top_k) for m in sizes.grown})
    for name, shape in {
        "E": lambda f: (num_experts * f, hidden, inner),
        "H": lambda f: (num_experts, hidden * f, inner),
        "I": lambda f: (num_experts, hidden, inner * f),
        "H and I": lambda f: (num_experts, hidden * f, inner * f),
    }.items():
        calls = {shape(f)["EHI".index(name[0])]: peers.random_experts(*shape(f)) for f in doubled}
        yield from grow(name, {size: peers.random_call(e, tokens, top_k) for size, e in calls.items()})

    call = peers.random_call(experts, tokens, top_k)
    all_threads = torch.get_num_threads()
    single = 0.0
    for threads in (n for n in range(1, all_threads + 1) if n & (n - 1) == 0 or n == all_threads):
        torch.set_num_threads(threads)
        taken = seconds(sizes.turns, run=lambda: forward(call))["run"]
        single = single or taken
        yield Row("threads", str(threads), 1e3 * taken, taken / single, "one thread")
    torch.set_num_threads(all_threads)


def hard_rows(sizes: Sizes) -> Iterator[Row]:
    """Inputs that need the rare ways of the GEMM, beside ordinary ones."""
    experts = peers.random_experts(sizes.experts // 4, sizes.hidden // 2, sizes.inner // 2)
    low, high = (
        peers.random_experts(experts.num_experts, experts.hidden_size, experts.intermediate_size, scales=s)
        for s in ((0, 24), (225, 256))
    )
    easy = peers.random_call(experts, 32, min(2, sizes.top_k))
    generator = torch.Generator().manual_seed(3)

    def scaled(spread: int) -> MoeCall:
        factors = torch.randint(-spread, spread + 1, easy.input.shape, generator=generator)
        return replace(easy, input=torch.ldexp(easy.input.float(), factors).to(torch.bfloat16))

    def with_value(value: float) -> MoeCall:
        chosen = torch.rand(easy.input.shape, generator=generator) < 2 / easy.input.shape[1]
        return replace(easy, input=easy.input.masked_fill(chosen, value))

    half = easy.input[:, : easy.input.shape[1] // 2]
    calls = {
        "normally distributed": easy,
        "second half of K cancels the first": replace(easy, input=torch.cat([half, -half], 1)),
        "exponents +-12": scaled(12),
        "exponents +-60": scaled(60),
        "some Inf": with_value(torch.inf),
        "some NaN": with_value(torch.nan),
        "near the end of float32's range": replace(easy, input=torch.full_like(easy.input, 3e38)),
        "scale bytes 0 to 23": replace(easy, experts=low),
        "scale bytes 225 to 255": replace(easy, experts=high),
    }
    times = seconds(sizes.turns, **{name: (lambda c=c: forward(c)) for name, c in calls.items()})
    for name, taken in times.items():
        ratio = taken / times["normally distributed"]
        target = {} if name == "normally distributed" else {"target": "<= 5", "met": ratio <= 5}
        yield Row("hard inputs", name, 1e3 * taken, ratio, "normally distributed", **target)  # type: ignore[arg-type]


def import_rows(sizes: Sizes) -> Iterator[Row]:
    """A fresh interpreter that imports torch alone, and the package with all its names."""
    statements = {
        "import torch": "import torch",
        "from mxfp4ref import *": "import torch; from mxfp4ref import *",
    }
    runs = {name: _command([sys.executable, "-c", code]) for name, code in statements.items()}
    times = seconds(sizes.turns, **runs)
    for name, taken in times.items():
        yield Row("import", name, 1e3 * taken, taken / times["import torch"], "torch alone")


def command_rows(_sizes: Sizes) -> Iterator[Row]:
    """Wall time of the long commands, once each."""
    for name, arguments, minutes in (
        ("regenerate the goldens", ["mxfp4ref", "regenerate", "--check"], 3),
        ("all tests", ["pytest", "-q", "-n", "auto"], 5),
        ("conform oracle", ["mxfp4ref", "conform", "oracle"], 2),
    ):
        start = time.perf_counter()
        _command([sys.executable, "-m", *arguments])()
        taken = time.perf_counter() - start
        yield Row("commands", name, 1e3 * taken, target=f"<= {minutes} min", met=taken <= 60 * minutes)


def _command(arguments: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def cuda_rows(sizes: Sizes) -> Iterator[Row]:
    """The oracle on a GPU with all the experts of a layer, beside the real kernel and the approximate reference."""
    num_experts = 8 * sizes.experts
    experts = peers.random_experts(num_experts, sizes.hidden, sizes.inner, "cuda")
    prepared = None
    if importlib.util.find_spec("flashinfer") is not None:
        import hardware

        prepared = hardware.prepare(experts)
    targets = {8: 40, 64: 150}
    for tokens in (*sizes.tokens, 8 * sizes.tokens[-1]):
        call = peers.random_call(experts, tokens, sizes.top_k)
        candidates: dict[str, Callable[[], Tensor]] = {
            "oracle": lambda call=call: forward(call),
            "approximate": lambda call=call: peers.moe(call),
        }
        if prepared is not None:
            candidates["kernel"] = lambda call=call: hardware.run_kernel(
                call, prepared=prepared, enable_pdl=False
            )
            if hardware.count_differences(candidates["kernel"](), forward(call)):
                raise RuntimeError("the oracle and the kernel give different bits")
        times = seconds(sizes.turns, **candidates)
        beside = "kernel" if prepared is not None else "approximate"
        for name, taken in times.items():
            row = Row("CUDA", f"{tokens} tokens, {name}", 1e3 * taken, taken / times[beside], beside)
            row = replace(row, peak_mib=peak_mib(candidates[name], "cuda"))
            if name == "oracle" and tokens in targets:
                limit = targets[tokens]
                row = replace(row, target=f"<= {limit} ms", met=1e3 * taken <= limit)
            yield row


SECTIONS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "dequantize": dequantize_rows,
    "forward": forward_rows,
    "growth": growth_rows,
    "hard": hard_rows,
    "import": import_rows,
    "commands": command_rows,
    "cuda": cuda_rows,
}
ON_REQUEST = ("commands", "cuda")


def table(rows: list[Row]) -> str:
    """The rows of a section as a Markdown table."""
    lines = ["| case | ms | ratio | of | peak MiB | target | met |", "|---|--:|--:|---|--:|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        cells = (row.case, f"{row.milliseconds:.2f}", ratio, row.of, peak, row.target, met)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment(cuda: bool) -> dict[str, object]:
    """What the numbers depend on."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_before": os.getloadavg()[0],
    }
    return {**found, "gpu": torch.cuda.get_device_name()} if cuda else found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section; repeatable")
    parser.add_argument("--cuda", action="store_true", help="the section cuda")
    parser.add_argument("--commands", action="store_true", help="time regenerating, testing, conforming too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn")
    parser.add_argument("--turns", type=int, help="turns whose median counts (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    if options.turns is not None:
        sizes = replace(sizes, turns=options.turns)
    chosen = options.only or [name for name in SECTIONS if name not in ON_REQUEST and not options.cuda]
    chosen += [name for name in ON_REQUEST if getattr(options, name) and name not in chosen]
    if "cuda" in chosen and not torch.cuda.is_available():
        parser.error("no GPU here")
    about = environment("cuda" in chosen)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows: list[Row] = []
    for name in chosen:
        made = list(SECTIONS[name](sizes))
        if options.quick:  # the targets are for the full sizes
            made = [replace(row, target="", met=None) for row in made]
        for section in dict.fromkeys(row.section for row in made):
            print(f"\n## {section}\n\n{table([row for row in made if row.section == section])}", flush=True)
        rows += made
    if options.json is not None:
        content = {"environment": about, "sizes": asdict(sizes), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
