"""What the package does, in one screen: compared with hardware, timed beside its peers, naming what is wrong."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import peers
from hardware import recorded
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mxfp4ref import conformance
from mxfp4ref.conformance.reports.html_report import to_html
from mxfp4ref.goldens import hardware_record
from mxfp4ref.goldens.store import open_goldens

ROOT = Path(__file__).resolve().parents[1]
CASE, TILE_K = "models/deepseek_v4_flash", (128, 128)
WRONG, SUITE = "defect:limit_ignored", "activation"
REPORT = ROOT / "build" / "demo.html"


def main() -> int:
    console = Console()
    agree = [check_recordings(console), run_layer(console)]
    name_a_defect(console)
    if not all(agree):
        console.print("[bold red]The package does not give what the hardware gave.[/]")
    return int(not all(agree))


def check_recordings(console: Console) -> bool:
    """Print what was compared with an H100's recordings; return whether all elements are equal."""
    table = Table("recorded on an H100", "elements", "differing", title="The package against hardware")
    scalar = recorded.load(recorded.RECORDINGS / "scalar.npz")
    cores = recorded.load(recorded.RECORDINGS / "wgmma.npz")
    moe = recorded.RECORDINGS / "moe"
    checks: dict[str, tuple[list[str], Callable[[str], tuple[int, int]]]] = {
        "float32 operations": (
            recorded.scalar_names(scalar),
            lambda name: recorded.scalar_differences(scalar, name),
        ),
        "tensor-core steps": (
            recorded.tensor_core_names(cores),
            lambda name: recorded.tensor_core_differences(cores, name),
        ),
        "mixture-of-experts calls": (
            recorded.MOE_CASES,
            lambda name: recorded.moe_differences(recorded.load(moe / f"{name}.npz")),
        ),
    }
    total = 0
    for kind, (names, check) in checks.items():
        words = f"checking {kind}"
        if not console.is_terminal:
            console.print(f"{words} ...")
        counts = [check(name) for name in track(names, words, console=console, transient=True)]
        compared, differing = (sum(column) for column in zip(*counts, strict=True))
        table.add_row(kind, f"{compared:,}", f"{differing:,}")
        total += differing
    console.print(table)
    return total == 0


def run_layer(console: Console) -> bool:
    """Print warm times and how many elements are not the real kernel's; return whether all of the drop-in's are."""
    goldens = open_goldens(ROOT / "goldens")
    case = goldens.load(CASE)
    with doing(console, f"making the weights of {case.id}"):
        call = case.call()
    expected, digest = case.outputs[TILE_K], case.output_hashes[TILE_K]
    records = [r for r in hardware_record.read(goldens) if r["case"] == CASE and tuple(r["tile_k"]) == TILE_K]
    agreeing = [record for record in records if record["sha256"] == digest]
    experts = call.experts
    logical = {
        "fc1_expert_weights": experts.fc1_weights,
        "fc2_expert_weights": experts.fc2_weights,
        "quant_scales": [experts.fc1_scales, experts.fc2_scales],
        "swiglu_limit": experts.swiglu_limit,
    }
    runs = {"mxfp4ref, drop-in": peers.drop_in(call, logical, weight_layout="logical")}
    table = Table(
        *("reference", "ms", "elements", "not the kernel's"),
        title=f"{case.id}: {experts.num_experts} experts, {call.num_tokens} tokens, top {call.top_k}",
        caption=f"{len(agreeing)} of {len(records)} recorded runs of the real kernel gave the stored output "
        f"({', '.join(sorted({record['gpu'] for record in records}))}), by SHA-256.",
    )
    wrong = []
    for name, run in (runs | peers.approximations(call)).items():
        with doing(console, f"timing {name}"):
            output, milliseconds = timed(run, compiles=name != peers.FLASHINFERS_TESTS)
        wrong.append(recorded.count_differences(output, expected))
        table.add_row(name, f"{milliseconds:.0f}", f"{output.numel():,}", f"{wrong[-1]:,}")
    console.print(table)
    return wrong[0] == 0 and 0 < len(agreeing) == len(records)


def name_a_defect(console: Console) -> None:
    """Run a kernel that is wrong on purpose, print the verdict, and write the report."""
    goldens = open_goldens(ROOT / "goldens")
    cases = [goldens.load(name) for name in goldens.names(SUITE)]
    with doing(console, f"running {WRONG} over {SUITE}") as now:
        report = conformance.run(WRONG, cases, progress=lambda result: now(f"{WRONG} ran {result.case}"))
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(to_html(report), encoding="utf-8")
    console.print(f"\n[bold]mxfp4ref conform {WRONG} --case {SUITE}[/]\n{escape(report.verdict)}")
    console.print(f"The whole report: {REPORT.relative_to(ROOT)}", highlight=False)


@contextmanager
def doing(console: Console, words: str) -> Iterator[Callable[[str], None]]:
    """A spinner with what is done, and a function to tell it what else; a line where none can be drawn."""
    if console.is_terminal:
        with console.status(words) as status:
            yield status.update
    else:
        console.print(f"{words} ...")
        yield lambda words: None


def timed(run: Callable[[], Tensor], compiles: bool) -> tuple[Tensor, float]:
    """The output, and the milliseconds of a call: a single one, which takes long, or the median of three warm ones.

    What compiles does so in a call before, which does not count.
    """
    if compiles:
        run()
    times = []
    for _ in range(3 if compiles else 1):
        start = time.perf_counter()
        output = run()
        times.append(1e3 * (time.perf_counter() - start))
    return output, statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
