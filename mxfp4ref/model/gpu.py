"""The forward on a Hopper GPU: five kernels, and the host never looks at what they computed.

It is used after `gpu_trial` has compared it with the CPU. `MXFP4REF_GPU_GEMM=emulated` in the environment keeps it
out, so that the GEMMs are computed term by term; see `docs/arithmetic.md`, "On a GPU".
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxfp4ref._validate import check_choice
from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import PLAIN, Generation
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.gpu.tiles import Tiles, tiles_for
from mxfp4ref.sm90.tactics import Tactic

if TYPE_CHECKING:
    from mxfp4ref.sm90.gpu.gemm import Packed
    from mxfp4ref.sm90.gpu.routing import Rows

__all__ = ["forward_in_parts", "stored_for", "usable"]

# What the intermediates of some tokens may take: 4096 tokens of DeepSeek-V4-Flash at once. Tokens do not influence
# each other.
_INTERMEDIATE_BYTES = 1 << 29


def usable(call: MoeCall) -> bool:
    """Whether a call's forward is computed here: MXFP4 on a Hopper GPU whose kernels have passed their trial.

    Raises:
        RuntimeError: a CUDA graph is being captured and there was no trial yet.
        ValueError: `MXFP4REF_GPU_GEMM` in the environment is something else than "emulated".
    """
    device = call.input.device
    if emulated := os.environ.get("MXFP4REF_GPU_GEMM", ""):
        check_choice("MXFP4REF_GPU_GEMM", emulated, ("emulated",))
    prepared = isinstance(call.experts, HummingExperts)
    if device.type != "cuda" or not call.experts.quantized or emulated or prepared:
        return False
    if PLAIN in (call.kernel.generation, stored_for(call.experts)):
        return False  # no Triton kernel reads its layout or adds in its order
    from mxfp4ref.model import gpu_trial

    return gpu_trial.passed(device, stored_for(call.experts), _tiles(call), call.activation)


def stored_for(experts: Experts) -> Generation | None:
    """The generation in whose layouts experts are, None for logical ones."""
    return experts.generation if isinstance(experts, Sm90Experts) else None


def forward_in_parts(
    call: MoeCall, *, keep: bool, tiles: Tiles | None = None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Outputs `[M, H] bf16` and, if they are to be kept, the intermediates by name, for some tokens at a time.

    Nothing synchronises unless intermediates are kept, so that a CUDA graph can capture it. `tiles` are chosen by the
    number of rows if None is given.
    """
    experts = call.experts
    bytes_per_slot = 2 * (3 * experts.intermediate_size + experts.hidden_size)
    bytes_per_slot += keep * 4 * (2 * experts.intermediate_size + experts.hidden_size)
    at_once = max(_INTERMEDIATE_BYTES // (bytes_per_slot * max(call.top_k, 1)), 1)
    tiles = tiles or _tiles(call)
    packed = (_packed(experts, "fc1"), _packed(experts, "fc2"))
    before = torch.zeros(experts.num_experts, dtype=torch.int32, device=call.input.device)
    for begin in range(0, max(call.num_tokens, 1), at_once):
        with torch.no_grad(), torch.cuda.device_of(call.input):  # type: ignore[no-untyped-call]
            tokens = slice(begin, begin + at_once)
            rows, computed = _forward(call, tokens, packed, tiles, before, keep)
            if begin + at_once < call.num_tokens:
                before = before + rows.count
            output = computed.pop("output")
            kept = _of_routed_rows(computed, rows, begin) if keep else {}
        yield output, kept


def _tiles(call: MoeCall) -> Tiles:
    return tiles_for(call.num_tokens * call.top_k, call.num_global_experts)


def _forward(
    call: MoeCall,
    tokens: slice,
    packed: tuple[Packed, Packed],
    tiles: Tiles,
    before: Tensor,
    keep: bool,
) -> tuple[Rows, dict[str, Tensor]]:
    """The stages in order for some tokens, of which earlier ones have had `before [E]` rows."""
    # Imported where a GPU is used, since the package does not require Triton.
    from mxfp4ref.sm90.gpu.elementwise import activate, finalize
    from mxfp4ref.sm90.gpu.gemm import gemm
    from mxfp4ref.sm90.gpu.routing import route

    experts, device, computed = call.experts, call.input.device, {}
    ids = call.token_selected_experts[tokens].contiguous()
    rows = route(ids, experts.num_experts, call.ep_rank * experts.num_experts, tiles, before)
    if keep:
        for number, weights in enumerate(packed, start=1):
            shape = (ids.numel(), weights.num_rows)
            computed[f"fc{number}_accumulators"] = torch.empty(shape, dtype=torch.float32, device=device)

    def of_all_rows(number: int, x: Tensor) -> Tensor:
        tactic = call.kernel.tactics[number]
        return gemm(
            x,
            packed[number],
            rows,
            tile_k=tactic.tile_k,
            swapped=_first_pair_swapped(call.kernel.generation, tactic, device),
            gathered=number == 0,
            accumulators=computed.get(f"fc{number + 1}_accumulators"),
        )

    activation, bias = call.activation, _contiguous(experts.fc1_biases)
    parameters = [_contiguous(getattr(experts, name)) for name in activation.defaults]
    computed["fc1_output"] = of_all_rows(0, _aligned(call.input[tokens]))
    computed["activation"] = activate(activation, computed["fc1_output"], rows, bias, parameters)
    computed["fc2_output"] = of_all_rows(1, computed["activation"])
    bias = _contiguous(experts.fc2_biases if call.tp_rank == 0 else None)
    scales = call.token_final_scales[tokens].contiguous()
    computed["output"] = finalize(computed["fc2_output"], rows, scales, bias)
    return rows, computed


def _of_routed_rows(computed: dict[str, Tensor], rows: Rows, first_token: int) -> dict[str, Tensor]:
    """The intermediates without what lies behind the routed rows, and where those come from."""
    slot, top_k = rows.slot.to(torch.int64), max(rows.top_k, 1)
    computed |= {"token": first_token + slot // top_k, "slot": slot % top_k}
    computed["expert"] = rows.expert.to(torch.int64)
    num_rows = int(rows.start[-1])
    return {name: tensor[:num_rows] for name, tensor in computed.items()}


def _packed(experts: Experts, name: str) -> Packed:
    """The weights of "fc1" or "fc2" as they lie in memory."""
    from mxfp4ref.sm90.gpu.gemm import Packed
    from mxfp4ref.sm90.gpu.weights import layout_of

    codes, scales = getattr(experts, f"{name}_weights"), getattr(experts, f"{name}_scales")
    layout = layout_of(stored_for(experts))
    return Packed(_aligned(codes), _aligned(scales), codes.shape[1], 2 * codes.shape[2], layout)


@functools.cache
def _first_pair_swapped(generation: Generation, tactic: Tactic, device: torch.device) -> Tensor | None:
    """Which rows of an N tile round the second product before the first, `[tile_n] int32`; None for none."""
    positions = torch.arange(tactic.tile_n, device="cpu")
    swapped = generation.first_pair_swapped(positions, tactic.tile_n, tactic.tile_k)
    return swapped.to(device, torch.int32) if swapped.any() else None


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and where 16 bytes can be read at once; a copy only if it was not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
