"""Record what a GPU gives for the goldens, and what its instructions give, as data in goldens/hardware/.

On the GPU machine, with flashinfer importable (see hardware.py) and nvcc for the instructions:

    python tools/hardware/record_hardware.py goldens OUT       every kernel-call case, each pair of K tiles, twice
    python tools/hardware/record_hardware.py tactics OUT       every tile and cluster, for either GEMM, on one case
    python tools/hardware/record_hardware.py instructions OUT  all 2^32 arguments of EX2 and RCP, tensor-core steps
    python tools/hardware/record_hardware.py stress OUT        large batches, CUDA graphs, PDL on and off

On any machine, the only way anything gets into goldens/hardware/:

    python tools/hardware/record_hardware.py install OUT...    copy records there and write the table of its README
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hardware
import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward
from mxfp4ref._files import write_file
from mxfp4ref.conformance import Skip
from mxfp4ref.conformance.isolation.handing import to_device
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_kernel
from mxfp4ref.formats.generations import NEWEST, generation_of
from mxfp4ref.goldens import Case, open_goldens, tensor_bytes
from mxfp4ref.sm90 import mufu, tensor_core
from mxfp4ref.sm90.tactics import Sm90Kernel, each_kernel

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "goldens" / "hardware"
TACTICS_CASE = "gemm/mirrored_both_512"
STEP_BLOCKS = 4096  # of 16 x 8 results, at once


def record_goldens(out: Path, only: Sequence[str] = ()) -> int:
    """Each kernel-call case by each pair of K tiles; two runs have to agree."""
    provenance = hardware.Provenance.of_this_machine()
    kernel = flashinfer_kernel()
    generation = kernel.generation
    lines: list[dict[str, Any]] = []
    for case in _kernel_cases(only):
        on_gpu = to_device(case.call(), "cuda")
        for tile_k, name in case.output_tensors.items():
            if not generation.forces_tactics and tile_k != (128, 128):
                continue
            kernel_of_case = case.kernel(Sm90Kernel.of_tiles(tile_k, generation=generation))
            call = replace(on_gpu, kernel=kernel_of_case)
            try:
                launch = hardware.launcher(kernel, call)
                got, again = (launch().cpu() for _ in range(2))
            except (Skip, RuntimeError) as reason:  # what an older release does not take yet
                print(f"{case.id} was not run: {str(reason).splitlines()[-1]}")
                continue
            expected = case.tensors[name] if generation is NEWEST else forward(call).cpu()
            got, again = (_as_stored(case.call(), output) for output in (got, again))
            lines.append(_line(case, tile_k, got, again, expected, provenance))
    part = "".join(f"-{pattern.partition('/')[0]}" for pattern in only)
    return _report(out / f"{_slug(provenance)}{part}.jsonl", lines)


def record_tactics(out: Path) -> int:
    """Every tile and cluster that runs, for GEMM1 beside a default GEMM2 and the other way round."""
    provenance = hardware.Provenance.of_this_machine()
    case = open_goldens(ROOT / "goldens").load(TACTICS_CASE)
    lines = []
    kernel = flashinfer_kernel()
    call = to_device(case.call(), "cuda")
    for forced in each_kernel(call.experts.gemm_shapes, kernel.generation):
        launch = hardware.launcher(kernel, replace(call, kernel=forced))
        got, again = (launch().cpu() for _ in range(2))
        line = _line(case, forced.tile_k, got, again, case.outputs[forced.tile_k], provenance)
        lines.append(line | {"tactics": [str(tactic) for tactic in forced.tactics]})
    return _report(out / f"{_slug(provenance)}-tactics.jsonl", lines)


def record_instructions(out: Path) -> int:
    """The two special functions over all arguments, and random tensor-core steps, against the model."""
    provenance = hardware.Provenance.of_this_machine()
    library = _build_probe()
    record: dict[str, Any] = {"provenance": provenance.as_dict()}
    chunk = 1 << 24
    for which, (name, model) in enumerate((("ex2", mufu.ex2), ("rcp", mufu.rcp))):
        differing = 0
        got = torch.empty(chunk, dtype=torch.float32, device="cuda")
        for first in range(0, 1 << 32, chunk):
            _check(library.run_special(which, ctypes.c_uint32(first), chunk, ctypes.c_void_p(got.data_ptr())))
            arguments = torch.arange(first, first + chunk, device="cuda").to(torch.int32).view(torch.float32)
            differing += int((got.view(torch.int32) != model(arguments).view(torch.int32)).sum())
        record[name] = {"compared": 1 << 32, "differing": differing}
    for name, blocks in _step_inputs():
        counts = record.setdefault(f"tensor core, {name}", {"compared": 0, "differing": 0})
        for a, b, c in blocks:
            got = torch.empty_like(c)
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c, got))
            _check(library.run_step(len(a), *pointers))
            expected = tensor_core.step(a[:, :, None], b[:, None], c)
            counts["compared"] += got.numel()
            counts["differing"] += int((got.view(torch.int32) != expected.view(torch.int32)).sum())
    path = out / f"{_slug(provenance)}-instructions.json"
    write_file(path, json.dumps(record, indent=2) + "\n")
    print(path.read_text())
    return int(any(entry["differing"] for key, entry in record.items() if key != "provenance"))


def record_stress(out: Path, seconds: float = 30.0) -> int:
    """Large calls again and again, by graph and by launch, with and without PDL: a race shows as a difference."""
    provenance = hardware.Provenance.of_this_machine()
    kernel = flashinfer_kernel()
    generator = torch.Generator("cuda").manual_seed(0)

    def random_bytes(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device="cuda", generator=generator)

    experts, hidden, inner, top_k, tokens = 256, 1024, 512, 6, 8192
    weights = Experts(
        fc1_weights=random_bytes(0, 256, experts, 2 * inner, hidden // 2),
        fc1_scales=random_bytes(112, 128, experts, 2 * inner, hidden // 32),
        fc2_weights=random_bytes(0, 256, experts, hidden, inner // 2),
        fc2_scales=random_bytes(112, 128, experts, hidden, inner // 32),
        swiglu_limit=torch.full((experts,), 10.0, device="cuda"),
    )
    ranked = torch.rand(tokens, experts, device="cuda", generator=generator).argsort(1)
    call = MoeCall(
        input=torch.randn(tokens, hidden, device="cuda", generator=generator).to(torch.bfloat16),
        token_selected_experts=ranked[:, :top_k].to(torch.int32),
        token_final_scales=torch.rand(tokens, top_k, device="cuda", generator=generator),
        experts=weights,
        kernel=Sm90Kernel(generation=kernel.generation),
    )
    expected = forward(call)
    record: dict[str, Any] = {"provenance": provenance.as_dict(), "tokens": tokens, "experts": experts}
    variants = [(pdl, graph) for pdl in (False, True) for graph in (False, True)]
    for pdl, graph in variants:
        launch = hardware.launcher(kernel, call, enable_pdl=pdl)
        run = _graphed(launch) if graph else launch
        counts = {"runs": 0, "compared": 0, "differing": 0}
        end = time.monotonic() + seconds / len(variants)
        while time.monotonic() < end:
            got = run()
            counts["runs"] += 1
            counts["compared"] += got.numel()
            counts["differing"] += hardware.count_differences(got, expected)
        record[f"pdl {'on' if pdl else 'off'}, {'graph' if graph else 'launches'}"] = counts
    path = out / f"{_slug(provenance)}-stress.json"
    write_file(path, json.dumps(record, indent=2) + "\n")
    print(path.read_text())
    return int(
        any(entry["differing"] for entry in record.values() if isinstance(entry, dict) and "runs" in entry)
    )


def install(sources: list[Path]) -> int:
    """Copy records into goldens/hardware/ and write the table of its README from everything there."""
    TARGET.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for path in sorted(source.glob("*.json*")) if source.is_dir() else [source]:
            text = path.read_text()
            parsed = (
                [json.loads(line) for line in text.splitlines()]
                if path.suffix == ".jsonl"
                else json.loads(text)
            )
            if not parsed:
                raise SystemExit(f"{path}: nothing recorded")
            write_file(TARGET / path.name, text)
    write_file(TARGET / "README.md", _readme())
    print(_readme())
    return 0


def _readme() -> str:
    rows: list[tuple[str, ...]] = []
    for path in sorted(TARGET.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        cases = {line["case"] for line in lines}
        what = (
            f"{len(cases)} golden cases, {len(lines)} runs twice"
            if len(cases) > 1
            else f"{len(lines)} tactics"
        )
        compared, differing = (sum(line[key] for line in lines) for key in ("elements", "differing"))
        rows.append(
            (*(lines[0][k] for k in ("gpu", "driver", "flashinfer")), what, f"{compared:,}", f"{differing:,}")
        )
    for path in sorted(TARGET.glob("*.json")):
        record = json.loads(path.read_text())
        machine = tuple(record["provenance"][key] for key in ("gpu", "driver", "flashinfer"))
        if "seeds" in record:
            first, end = record["seeds"]
            clusters = ", any cluster" if record.get("clusters") else ""
            size = " of real size" if record.get("real_size") else ""
            names = ", ".join(record.get("activations", []))  # none: recorded when there was SwiGLU alone
            of = f" of {names}" if names else ""
            path_ = f" of {record['path']}" if "path" in record else ""
            what = f"random calls{path_}{size}{of}{clusters}, seeds {first} to {end - 1}"
            rows.append((*machine, what, f"{record['elements']:,}", f"{record['differing']:,}"))
        if "path" in record:  # all calls made for a question, and all golden ones, in a row each
            record = _sums(record)
        for key, counts in record.items():
            if isinstance(counts, dict) and "compared" in counts:
                what = f"{key}, {counts['runs']} runs" if "runs" in counts else key
                rows.append((*machine, what, f"{counts['compared']:,}", f"{counts['differing']:,}"))
    header = ("GPU", "driver", "flashinfer", "what was run", "elements", "differing")
    table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * 6, *rows))
    return _README.format(table=table)


def _sums(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The counts of `humming_cases.py`, those of golden calls (named suite/name) and of others summed up."""
    sums: dict[str, dict[str, int]] = {}
    for key, counts in record.items():
        if isinstance(counts, dict) and "compared" in counts:
            kind = f"{'golden' if '/' in key else 'designed'} calls of {record['path']}"
            total = sums.setdefault(kind, dict.fromkeys(counts, 0))
            sums[kind] = {name: total[name] + value for name, value in counts.items()}
    return sums


_README = """# What real hardware gave

Written by `tools/hardware/record_hardware.py install` and nothing else. `*.jsonl` has a line for each run of a golden
case: the K tiles (and tactics, where they were varied) of the two GEMMs, the SHA-256 of the output's bytes,
whether it was what the model gives for that generation, how many elements there were and how many differed. The
other files hold counts: random calls that mix every option (`tools/hardware/random_cases.py`, for W4A8
`humming_cases.py`; a seed makes the same call everywhere), the special functions over all 2^32 arguments, single
tensor-core steps, and repeated large calls.
`mxfp4ref verify`, and the tests, hold the goldens against these records on any machine.

{table}

The older kernel (`generation` 0.6.9 here, `BYTEWISE` in the package) rounds the second of the first two products of a
sum alone, in every row; the newer one (0.6.16, `WORDWISE`) does so in some rows of some tiles. It shows only where
one of the two products leaves float32's range.

The differing elements of 0.6.15.post1, 0.6.16.post3 and 0.6.17 are a race of those releases (flashinfer issue 5438),
not a rule: they are in a few calls, all with a GEMM whose K is a single tile of 128 (95 of 4,030 random ones of
0.6.16.post3, 204 of 7,823 of 0.6.17, and of both the same two golden ones, with hundreds of experts or tokens, whose
two launches did not agree), and from run to run it is other calls (0.6.15.post1: 16, 15 and 15 in three runs of 585,
14 of them in all three) and other elements (seed 409, six runs: 4309, 1867, 3446, 2868, 5434 and 4329).
"""


def _as_stored(call: MoeCall, output: Tensor) -> Tensor:
    """What a launch left, as goldens have it: rows that are not to be written are zeros if still as filled."""
    unwritten = torch.where(output.isnan(), 0.0, torch.nan).to(output.dtype)
    return torch.where(call.written[:, None], output, unwritten)


def _kernel_cases(only: Sequence[str]) -> Iterator[Case]:
    goldens = open_goldens(ROOT / "goldens")
    for name in goldens.names():
        if only and not any(fnmatch.fnmatch(name, pattern) for pattern in only):
            continue
        case = goldens.load(name)
        if case.kind == "moe" and case.experts.quantized:
            yield case


def _line(
    case: Case,
    tile_k: tuple[int, int],
    got: Tensor,
    again: Tensor,
    expected: Tensor,
    provenance: hardware.Provenance,
) -> dict[str, Any]:
    differing = hardware.count_differences(got, expected)
    return {
        "case": case.id,
        "tile_k": list(tile_k),
        "sha256": hashlib.sha256(tensor_bytes(got)).hexdigest(),
        "equal": differing == 0,
        "elements": got.numel(),
        "differing": differing,
        "generation": generation_of(provenance.flashinfer).recorded_as,
        "repeatable": hardware.count_differences(got, again) == 0,
        **provenance.as_dict(),
    }


def _report(path: Path, lines: list[dict[str, Any]]) -> int:
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
    by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_case[line["case"]].append(line)
    bad = [line for line in lines if not (line["equal"] and line["repeatable"])]
    for line in bad:
        tiles = line.get("tactics", line["tile_k"])
        print(
            f"{line['case']} {tiles}: {line['differing']} of {line['elements']} differ, "
            f"{'the same twice' if line['repeatable'] else 'not the same twice'}"
        )
    elements = sum(line["elements"] for line in lines)
    print(
        f"{path.name}: {len(by_case)} cases, {len(lines)} runs, {elements:,} elements; {len(bad)} runs not equal"
    )
    return int(bool(bad))


def _graphed(launch: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same launches, captured in a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = launch()

    def run() -> Tensor:
        graph.replay()
        return output

    return run


def _step_inputs() -> Iterator[tuple[str, Iterator[tuple[Tensor, Tensor, Tensor]]]]:
    generator = torch.Generator("cuda").manual_seed(0)

    def bits(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device="cuda", generator=generator)

    def raw(*shape: int) -> Tensor:
        return bits(-(1 << 15), 1 << 15, *shape).to(torch.int16).view(torch.bfloat16)

    def spread(exponents: int, *shape: int) -> Tensor:
        values = torch.randn(shape, device="cuda", generator=generator)
        return (values * torch.exp2(bits(-exponents, exponents, *shape).to(torch.float32))).to(torch.bfloat16)

    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cuda")
    makers: dict[str, Callable[..., Tensor]] = {
        "any bits": raw,
        "exponents over 2^+-8": lambda *shape: spread(8, *shape),
        "exponents over 2^+-20": lambda *shape: spread(20, *shape),
    }
    for name, make in makers.items():
        for weights in ("bf16", "E2M1"):

            def blocks(
                make: Callable[..., Tensor] = make, weights: str = weights
            ) -> Iterator[tuple[Tensor, ...]]:
                for _ in range(16):
                    a = make(STEP_BLOCKS, 16, 16)
                    if weights == "E2M1":
                        a = codes[bits(0, 16, STEP_BLOCKS, 16, 16)].to(torch.bfloat16)
                    c = make(STEP_BLOCKS, 16, 8).to(torch.float32)
                    c = (c.view(torch.int32) ^ bits(0, 1 << 16, STEP_BLOCKS, 16, 8).to(torch.int32)).view(
                        torch.float32
                    )
                    yield a, make(STEP_BLOCKS, 8, 16), c

            yield f"{weights} by bf16, {name}", blocks()  # type: ignore[misc]


def _build_probe() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    source = Path(__file__).with_name("hardware_probe.cu")
    command = [
        "nvcc",
        "-O2",
        "-arch=sm_90a",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        str(folder / "probe.so"),
        str(source),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}")


def _slug(provenance: hardware.Provenance) -> str:
    gpu = provenance.gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")
    return f"{gpu}-flashinfer-{provenance.flashinfer}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recorders = {
        "goldens": record_goldens,
        "tactics": record_tactics,
        "instructions": record_instructions,
        "stress": record_stress,
    }
    for name, function in recorders.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("out", type=Path, help="the folder to write the record to")
        if name == "goldens":
            command.add_argument(
                "--only",
                action="append",
                default=[],
                help="run these cases, as 'suite/*'; the record is a file of its own; repeatable",
            )
    command = commands.add_parser("install", help=install.__doc__)
    command.add_argument("sources", type=Path, nargs="*", help="folders or files of records")
    arguments = parser.parse_args()
    if arguments.command == "install":
        return install(arguments.sources)
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: the real kernel runs nowhere else")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.command == "goldens":
        return record_goldens(arguments.out, arguments.only)
    return recorders[arguments.command](arguments.out)


if __name__ == "__main__":
    sys.exit(main())
