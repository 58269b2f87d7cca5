"""Reading the hardware recordings, and the package's answer to each of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._files import read_file
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90 import fp8, fp32, tensor_core
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic

Arrays = dict[str, np.ndarray]
RECORDINGS = Path(__file__).resolve().parents[2] / "tests" / "recordings"
MOE_CASES = sorted(path.stem for path in (RECORDINGS / "moe").glob("*.npz"))
FIRST_PAIR_CASES = ("first_pair_overflow", "first_pair_underflow")
SCALAR_OPERATIONS = {
    "add": fp32.add,
    "bf16": fp32.to_bf16,
    "fma": fp32.fma,
    "max": fp32.maximum,
    "min": fp32.minimum,
    "mul": fp32.mul,
}


def load(path: Path) -> Arrays:
    with np.load(io.BytesIO(read_file(path)), allow_pickle=False) as file:
        return dict(file)


def bf16(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def fp32_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.view(np.int32)).view(torch.float32)


def count_differences(got: Tensor, expected: Tensor) -> int:
    """How many elements differ in any bit."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    integers = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return int((got.view(integers) != expected.view(integers)).sum())


def moe_variants(arrays: Arrays) -> Iterator[tuple[MoeCall, Tensor]]:
    """A call and the recorded output for each tactic."""
    ep_size, ep_rank = arrays.get("ep", np.array([1, 0])).tolist()
    tp_size, tp_rank = arrays.get("tp", np.array([1, 0])).tolist()
    optional = {"fc1_biases": "b1", "fc2_biases": "b2"}
    parameters = {"swiglu_alpha": "alpha", "swiglu_beta": "beta", "swiglu_limit": "limit"}
    experts = Experts(
        fc1_weights=torch.from_numpy(arrays["w1"]),
        fc1_scales=torch.from_numpy(arrays["s1"]),
        fc2_weights=torch.from_numpy(arrays["w2"]),
        fc2_scales=torch.from_numpy(arrays["s2"]),
        **{name: bf16(arrays[key]) for name, key in optional.items() if key in arrays},
        **{name: torch.from_numpy(arrays[key]) for name, key in parameters.items() if key in arrays},
    )
    if ep_size > 1 and "first_expert" not in arrays:
        count = experts.num_experts // ep_size
        experts = experts.slice(ep_rank * count, (ep_rank + 1) * count)
    if "tile" in arrays:  # GEMM2's M, N, K; GEMM1 has the default tactic
        kernels = [Sm90Kernel(gemm2=Tactic(tuple(tile))) for tile in arrays["tile"].tolist()]
    else:
        kernels = [Sm90Kernel.of_tiles(tuple(pair)) for pair in arrays["tile_k"].tolist()]
    outputs = arrays["out"][arrays["which"]] if "which" in arrays else arrays["out"]
    for kernel, out in zip(kernels, outputs, strict=True):
        call = MoeCall(
            input=bf16(arrays["x"]),
            token_selected_experts=torch.from_numpy(arrays["ids"]),
            token_final_scales=torch.from_numpy(arrays["scales"]),
            experts=experts,
            ep_size=ep_size,
            ep_rank=ep_rank,
            tp_size=tp_size,
            tp_rank=tp_rank,
            kernel=kernel,
            strict=False,
        )
        yield call, bf16(out)


def moe_differences(arrays: Arrays) -> tuple[int, int]:
    """Elements compared and elements that differ, over all recorded tactics."""
    compared = differing = 0
    outputs: dict[object, Tensor] = {}  # tiles that differ in M alone share an answer
    for call, expected in moe_variants(arrays):
        tiles = (call.kernel.tile_k, call.kernel.tile_n)
        if tiles not in outputs:
            outputs[tiles] = forward(call)
        compared += expected.numel()
        differing += count_differences(outputs[tiles], expected)
    return compared, differing


def scalar_names(arrays: Arrays) -> list[str]:
    return sorted(key.removesuffix("_o") for key in arrays if key.endswith("_o"))


def scalar_differences(arrays: Arrays, name: str) -> tuple[int, int]:
    operands = [fp32_tensor(arrays[f"{name}_{k}"]) for k in "abc" if f"{name}_{k}" in arrays]
    got = SCALAR_OPERATIONS[name.split("_")[0]](*operands)
    expected = arrays[f"{name}_o"]
    if got.dtype == torch.bfloat16:
        return got.numel(), count_differences(got, bf16(expected.astype(np.uint16)))
    return got.numel(), count_differences(got, fp32_tensor(expected))


def tensor_core_names(arrays: Arrays) -> list[str]:
    return sorted(key.removesuffix("_D") for key in arrays if key.endswith("_D"))


def tensor_core_differences(arrays: Arrays, name: str) -> tuple[int, int]:
    a, b = bf16(arrays[f"{name}_A"]), bf16(arrays[f"{name}_B"])
    c, expected = fp32_tensor(arrays[f"{name}_C"]), fp32_tensor(arrays[f"{name}_D"])
    acc = c if name.endswith("C") else torch.zeros_like(c)
    for index in range(a.shape[1]):
        acc = tensor_core.step(a[:, index, :, None], b[:, index, None], acc)
    return acc.numel(), count_differences(acc, expected)


def fp8_differences(arrays: Arrays, name: str) -> tuple[int, int]:
    """Of a set `<numbers>_<1 where C counts>_<steps>`."""
    a, b = (torch.from_numpy(arrays[f"{name}_{key}"]) for key in "AB")
    c, expected = fp32_tensor(arrays[f"{name}_C"]), fp32_tensor(arrays[f"{name}_D"])
    acc = c if name.split("_")[1] == "1" else torch.zeros_like(c)
    for index in range(a.shape[1]):
        acc = fp8.step(a[:, index, :, None], b[:, index, None], acc)
    return acc.numel(), count_differences(acc, expected)


def compare_all(source: Path) -> int:
    """Print a table of all recordings in a folder; 0 when no element differs."""
    rows: list[tuple[str, int, int]] = []

    def add(name: str, counts: tuple[int, int]) -> None:
        rows.append((name, *counts))
        print(f"{name:32} {counts[0]:>10,} compared {counts[1]:>8,} differ", flush=True)

    scalar = load(source / "scalar.npz")
    for name in scalar_names(scalar):
        add(f"scalar {name}", scalar_differences(scalar, name))
    tensor_core_sets = load(source / "wgmma.npz")
    for name in tensor_core_names(tensor_core_sets):
        add(f"tensor core {name}", tensor_core_differences(tensor_core_sets, name))
    fp8_sets = load(source / "fp8_wgmma.npz")
    for name in tensor_core_names(fp8_sets):
        add(f"FP8 tensor core {name}", fp8_differences(fp8_sets, name))
    for path in [*sorted((source / "moe").glob("*.npz")), *(source / f"{n}.npz" for n in FIRST_PAIR_CASES)]:
        add(path.stem, moe_differences(load(path)))
    compared, differing = (sum(row[i] for row in rows) for i in (1, 2))
    print(f"{'all':32} {compared:>10,} compared {differing:>8,} differ")
    return 0 if differing == 0 else 1
