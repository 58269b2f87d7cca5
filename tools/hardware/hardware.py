"""Calling the real kernel: flashinfer's `cutlass_fused_moe` with a chosen tactic, and what machine it ran on.

Works with an installed flashinfer or with the archive that `build_kernel.py` packs (unpack it and put the folder
on PYTHONPATH). `docs/arithmetic.md`, section 8.
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall
from mxfp4ref.formats.generations import generation_of
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.sm90.tactics import Sm90Kernel


@dataclass(frozen=True)
class PreparedExperts:
    """Weights and scales as the real call takes them."""

    fc1_weights: Tensor
    fc2_weights: Tensor
    fc1_scales: Tensor
    fc2_scales: Tensor


def prepare(experts: Experts) -> PreparedExperts:
    """Bring experts on a GPU into the real call's layouts with flashinfer's helpers.

    Raises:
        RuntimeError: a helper gives other bytes than `mxfp4ref.formats.layout`.
    """
    import flashinfer
    from flashinfer.fused_moe import (
        interleave_moe_scales_for_sm90_mixed_gemm,
        interleave_moe_weights_for_sm90_mixed_gemm,
    )

    prepared = {}
    for name in ("fc1", "fc2"):
        packed, scales = getattr(experts, f"{name}_weights"), getattr(experts, f"{name}_scales")
        weights = interleave_moe_weights_for_sm90_mixed_gemm(packed, "fp4")
        folded = interleave_moe_scales_for_sm90_mixed_gemm(scales, 32)
        generation = generation_of(flashinfer.__version__)
        same_weights = torch.equal(weights, interleave_weights_sm90(packed, generation))
        if not same_weights or not torch.equal(folded, fold_scales_sm90(scales, generation)):
            raise RuntimeError(
                f"{name}: flashinfer's layout helpers give other bytes than mxfp4ref.formats.layout"
            )
        prepared[f"{name}_weights"] = weights
        prepared[f"{name}_scales"] = folded.view(torch.int32)
    return PreparedExperts(**prepared)


def run_kernel(
    call: MoeCall,
    forced: Sm90Kernel | None = None,
    prepared: PreparedExperts | None = None,
    **options: Any,
) -> Tensor:
    """The real kernel's output for a call on a GPU, by the default tactics unless others are forced."""
    from flashinfer.fused_moe import cutlass_fused_moe

    prepared = prepare(call.experts) if prepared is None else prepared
    experts = call.experts
    output = torch.full_like(call.input, torch.nan)
    fc1_biases, fc2_biases = experts.fc1_biases, experts.fc2_biases
    if (fc1_biases is None) != (fc2_biases is None):
        # The real call takes both or none. Adding +0 changes nothing, since a GEMM never gives -0.
        rows = experts.fc1_weights.shape[:2], experts.fc2_weights.shape[:2]
        zeros = (torch.zeros(*shape, dtype=torch.bfloat16, device=call.input.device) for shape in rows)
        fc1_biases, fc2_biases = (
            z if b is None else b for z, b in zip(zeros, (fc1_biases, fc2_biases), strict=True)
        )
    if forced is not None:
        options["profile_ids"] = forced.profile_ids
    cutlass_fused_moe(
        call.input,
        call.token_selected_experts,
        call.token_final_scales,
        prepared.fc1_weights,
        prepared.fc2_weights,
        torch.bfloat16,
        quant_scales=[prepared.fc1_scales, prepared.fc2_scales],
        fc1_expert_biases=fc1_biases,
        fc2_expert_biases=fc2_biases,
        swiglu_alpha=experts.swiglu_alpha,
        swiglu_beta=experts.swiglu_beta,
        swiglu_limit=experts.swiglu_limit,
        tp_size=call.tp_size,
        tp_rank=call.tp_rank,
        ep_size=call.ep_size,
        ep_rank=call.ep_rank,
        output=output,
        use_w4_group_scaling=True,
        **options,
    )
    return output


def count_differences(got: Tensor, expected: Tensor) -> int:
    """How many bf16 elements differ in any bit."""
    return int((got.view(torch.int16) != expected.view(torch.int16)).sum())


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    python: str
    flashinfer: str

    @classmethod
    def of_this_machine(cls) -> Provenance:
        import flashinfer

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
        return cls(
            gpu=torch.cuda.get_device_name(),
            driver=driver,
            cuda=str(torch.version.cuda),
            torch=torch.__version__,
            python=platform.python_version(),
            flashinfer=flashinfer.__version__,
        )

    def as_dict(self) -> dict[str, str]:
        return asdict(self)
