"""Check the package against the hardware recordings, then run a DeepSeek-V4-Flash-sized layer through the oracle."""

from __future__ import annotations

import sys
import time

import torch
from hardware import recorded
from rich.console import Console
from rich.table import Table

from mxfp4ref import dequantize, torch_ref_cutlass_fused_moe

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 2048, 256, 6  # DeepSeek-V4-Flash
LIMIT, ROUTED_SCALING = 10.0, 1.5
TOKENS = 4


def main() -> int:
    console = Console()
    differing = check_recordings(console)
    run_layer(console)
    if differing:
        console.print(f"[bold red]{differing} elements differ from the hardware recordings[/]")
        return 1
    console.print("[bold green]Every recorded element is reproduced, bit for bit.[/]")
    return 0


def check_recordings(console: Console) -> int:
    """Print what was compared with an H100's recordings; return how many elements differ."""
    table = Table("recorded on an H100", "elements", "differing", title="The package against hardware")
    scalar = recorded.load(recorded.RECORDINGS / "scalar.npz")
    cores = recorded.load(recorded.RECORDINGS / "wgmma.npz")
    groups = {
        "float32 operations": (recorded.scalar_differences(scalar, n) for n in recorded.scalar_names(scalar)),
        "tensor-core steps": (
            recorded.tensor_core_differences(cores, n) for n in recorded.tensor_core_names(cores)
        ),
        "mixture-of-experts calls": (
            recorded.moe_differences(recorded.load(recorded.RECORDINGS / "moe" / f"{case}.npz"))
            for case in recorded.MOE_CASES
        ),
    }
    total = 0
    for name, counts in groups.items():
        with console.status(f"checking {name}"):
            compared, differing = (sum(column) for column in zip(*counts, strict=True))
        table.add_row(name, f"{compared:,}", f"{differing:,}")
        total += differing
    console.print(table)
    return total


def run_layer(console: Console) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    final_scales = weights / weights.sum(1, keepdim=True) * ROUTED_SCALING
    # Zero pages are free: only the experts that some token chose get weights.
    w1 = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2, dtype=torch.uint8)
    w2 = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE // 2, dtype=torch.uint8)
    s1 = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32, dtype=torch.uint8)
    s2 = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE // 32, dtype=torch.uint8)
    for expert in ids.unique().tolist():
        for tensor, low, high in ((w1, 0, 256), (w2, 0, 256), (s1, 117, 122), (s2, 117, 122)):
            tensor[expert].random_(low, high, generator=generator)

    start = time.perf_counter()
    exact = torch_ref_cutlass_fused_moe(
        x,
        ids.to(torch.int32),
        final_scales,
        w1,
        w2,
        torch.bfloat16,
        [s1, s2],
        swiglu_limit=torch.full((EXPERTS,), LIMIT),
        use_w4_group_scaling=True,
        weight_layout="logical",
    )
    exact_seconds = time.perf_counter() - start
    start = time.perf_counter()
    approximate = dequantise_and_matmul(x, ids, final_scales, w1, s1, w2, s2)
    approximate_seconds = time.perf_counter() - start

    title = f"A DeepSeek-V4-Flash layer: {EXPERTS} experts, {TOKENS} tokens, top {TOP_K}"
    table = Table("reference", "seconds", "output elements equal to the kernel's", title=title)
    same = float((approximate.view(torch.int16) == exact.view(torch.int16)).float().mean())
    table.add_row("mxfp4ref", f"{exact_seconds:.2f}", "100 %")
    table.add_row("dequantise to bf16, matmul", f"{approximate_seconds:.2f}", f"{100 * same:.1f} %")
    console.print(table)


def dequantise_and_matmul(
    x: torch.Tensor,
    ids: torch.Tensor,
    final_scales: torch.Tensor,
    w1: torch.Tensor,
    s1: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
) -> torch.Tensor:
    """What every public reference does: close, and only close."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        up, gate = (x[token] @ dequantize(w1[expert], s1[expert]).T).chunk(2, dim=1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        y = (torch.nn.functional.silu(gate) * up) @ dequantize(w2[expert], s2[expert]).T
        out[token] += (y * final_scales[token, slot, None]).to(torch.bfloat16)
    return out


if __name__ == "__main__":
    sys.exit(main())
