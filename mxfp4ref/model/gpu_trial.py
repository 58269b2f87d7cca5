"""Trust in the forward on a GPU: a trial before its first use, and a comparison on request."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import PARAMETERS, Experts, Sm90Experts
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.model import gpu
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU_BIAS, Activation
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gpu.tiles import Tiles
from mxfp4ref.sm90.tactics import Sm90Kernel

if TYPE_CHECKING:
    from mxfp4ref.model.forward import MoeTrace

__all__ = ["check", "compare_with_emulated", "passed", "trial_calls"]

_passed: dict[tuple[torch.device, Generation | None, Tiles, Activation], bool] = {}
_SWIGLU_BIAS = ACTIVATIONS[SWIGLU_BIAS]


def passed(
    device: torch.device, stored_for: Generation | None, tiles: Tiles, activation: Activation = _SWIGLU_BIAS
) -> bool:
    """Whether the kernels run on a device and give the CPU's bits; a warning says once why not.

    Each layout of weights, kind of tiles and activation is a binary of its own and has a trial of its own.

    Raises:
        RuntimeError: a CUDA graph is being captured and there was no trial yet.
    """
    key = (device, stored_for, tiles, activation)
    if key not in _passed:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{device}: the first forward of its kind compares the GPU with the CPU, which no CUDA graph can "
                "capture; make the same call once before the capture"
            )
        _passed[key] = _try(*key)
    return _passed[key]


def _try(
    device: torch.device, stored_for: Generation | None, tiles: Tiles, activation: Activation = _SWIGLU_BIAS
) -> bool:
    try:
        if torch.cuda.get_device_capability(device) != (9, 0):
            return False  # other tensor cores have other steps
        from mxfp4ref.sm90.gpu.elementwise import KERNELS

        if activation.id not in KERNELS:
            return False
        for call, expected in _trial(stored_for, activation):
            check(call, expected, device, tiles)
    except Exception as error:  # no Triton, no C compiler for it, a compiler that errs, ...
        warnings.warn(
            f"the forward on {device} takes longer than need be, for its kernels do not run here: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _trial(stored_for: Generation | None, activation: Activation) -> list[tuple[MoeCall, MoeTrace]]:
    from mxfp4ref.model.forward import trace

    return [(call, trace(call)) for call in trial_calls(stored_for, activation)]


def check(call: MoeCall, expected: MoeTrace, device: torch.device, tiles: Tiles) -> None:
    """Raise ArithmeticError unless a call on the CPU has the expected intermediates and output on the device."""
    names = ("input", "token_selected_experts", "token_final_scales", "experts")
    moved: dict[str, Any] = {name: getattr(call, name).to(device) for name in names}
    for output, kept in gpu.forward_in_parts(replace(call, **moved), keep=True, tiles=tiles):
        for name, tensor in {**kept, "output": output}.items():
            want, got = getattr(expected, name), tensor.cpu()
            if want.shape != got.shape:
                raise ArithmeticError(
                    f"{name} of a trial has the shape {list(got.shape)}, not {list(want.shape)}"
                )
            differing = int((want.view(torch.uint8) != got.view(torch.uint8)).any(-1).sum())
            if differing:
                raise ArithmeticError(f"{differing} rows of {name} of a trial are wrong")


def trial_calls(stored_for: Generation | None, activation: Activation = _SWIGLU_BIAS) -> Iterator[MoeCall]:
    """Two small calls on the CPU with numbers of every kind, in one layout; compilers have faults too.

    The first swaps the first two groups of some rows of GEMM1 and has biases and parameters; the second swaps those
    of GEMM2 and has, where the activation reads it, the limit only.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch.bfloat16)

    # GEMM1 has three K tiles; expert 0 has all tokens, more than there are rows in any tile.
    tokens, num_experts, hidden, inner = 140, 3, 384, 128
    x = normal(tokens, hidden)
    x[0] = random_bytes(2 * hidden).view(torch.bfloat16)
    x[1:6] = (x[1:6].float() * torch.exp2(random_bytes(5, hidden).float() / 8 - 16)).to(torch.bfloat16)
    x[6, 0], x[7, 0] = torch.nan, torch.inf
    codes, scales = [], []
    fc1_rows = 2 * inner if activation.gated else inner
    for rows, depth in ((fc1_rows, hidden), (hidden, inner)):
        codes.append(random_bytes(num_experts, rows, depth // 2))
        scale = 118 + random_bytes(num_experts, rows, depth // 32) % 6
        # Only half of the rows; in GEMM1 up, which the limit bounds, where an infinite gate would give NaNs.
        half = scale[:, : rows // 2 if activation.gated or rows == hidden else 0]
        half[1, ::3] = random_bytes(*half[1, ::3].shape)
        half[0, ::2, :2] = 254  # each of the first two products overflows, so that their order shows
        scales.append(scale)
    optional = {
        "fc1_biases": normal(num_experts, fc1_rows),
        "fc2_biases": normal(num_experts, hidden),
        "swiglu_alpha": torch.tensor([1.0, 1.702, 0.5], device="cpu"),
        "swiglu_limit": torch.tensor([10.0, 7.0, torch.inf], device="cpu"),
        "situ_beta": torch.tensor([4.0, 0.3, torch.inf], device="cpu"),
    }
    optional = {
        name: t for name, t in optional.items() if name not in PARAMETERS or name in activation.defaults
    }
    if stored_for is None:
        held = Experts(codes[0], scales[0], codes[1], scales[1], **optional)
    else:
        codes = [interleave_weights_sm90(tensor, stored_for) for tensor in codes]
        scales = [fold_scales_sm90(tensor, stored_for) for tensor in scales]
        held = Sm90Experts(codes[0], scales[0], codes[1], scales[1], **optional)
    ids = torch.tensor([[3, 0]], dtype=torch.int32, device="cpu").repeat(tokens, 1)
    ids[:40, 0] = torch.arange(40, device="cpu") * 5 % 7 % 4
    only_limit = replace(held, fc1_biases=None, fc2_biases=None, swiglu_alpha=None, situ_beta=None)
    for experts, tile_n in ((held, (64, 16)), (only_limit, (16, 64))):
        yield MoeCall(
            input=x,
            token_selected_experts=ids,
            token_final_scales=torch.rand(tokens, 2, generator=generator, device="cpu"),
            experts=experts,
            kernel=Sm90Kernel.of_tiles((128, 128), tile_n, NEWEST),
            strict=False,
            activation_type=activation.id,
        )


def compare_with_emulated(call: MoeCall, *, share: float = 0.01, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Compute a random share of the routed rows of both GEMMs term by term and compare the accumulators.

    Args:
        call: a call whose forward is computed by a Hopper GPU's tensor cores.
        share: of the routed rows, from 0 to 1; one row at least.
        seed: which rows are chosen.

    Returns:
        For "fc1" and "fc2" how many elements differ, which should be none, and how many were compared.

    Raises:
        ValueError: the call is computed term by term anyway.
    """
    from mxfp4ref.model.forward import trace

    if not gpu.usable(call):
        raise ValueError("call: expected MXFP4 experts on a Hopper GPU whose kernels run, got another call")
    rows = trace(call)
    device, num_rows = rows.expert.device, len(rows.expert)
    first = torch.searchsorted(rows.expert, torch.arange(call.experts.num_experts, device=device))
    position = torch.arange(num_rows, device=device) - first[rows.expert]
    generator = torch.Generator("cpu").manual_seed(seed)
    count = min(num_rows, max(1, round(share * num_rows)))
    chosen = torch.randperm(num_rows, generator=generator, device="cpu")[:count].to(device)
    inputs = (call.input[rows.token], rows.activation)
    accumulators = (rows.fc1_accumulators, rows.fc2_accumulators)
    found = {"fc1": (0, 0), "fc2": (0, 0)}
    for expert in sorted(set(rows.expert[chosen].tolist())):
        of_expert = chosen[rows.expert[chosen] == expert]
        for number, name in enumerate(found):
            weights, scales = call.experts.weights(name, expert)
            assert scales is not None
            expected = group_scaled_gemm(
                inputs[number][of_expert][None],
                weights,
                scales,
                tactic=call.kernel.tactics[number],
                generation=call.kernel.generation,
                positions=position[of_expert][None],
            )
            got = accumulators[number][of_expert]
            differing = int((got.view(torch.int32) != expected[0].view(torch.int32)).sum())
            found[name] = (found[name][0] + differing, found[name][1] + got.numel())
    return found
