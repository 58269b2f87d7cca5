"""The installed flashinfer as a kernel under test, with a package of this test in its place."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import torch_ref_cutlass_fused_moe
from mxfp4ref.conformance import run
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_kernel
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.formats.generations import generation_of
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.goldens import open_goldens
from mxfp4ref.sm90.tactics import Sm90Kernel

RELEASE = "0.6.17"
KERNEL = Sm90Kernel(generation=generation_of(RELEASE))


def without_situ(
    *,
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    swiglu_limit: Tensor | None = None,
    output: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    use_w4_group_scaling: bool = False,
    activation_type: int = 3,
    enable_pdl: bool | None = None,
) -> Any:
    """A release with fewer arguments than the newest one has."""
    return torch_ref_cutlass_fused_moe(**locals(), kernel=KERNEL)


def test_calls_with_an_argument_that_a_release_does_not_have_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generation = KERNEL.generation
    package, fused_moe = ModuleType("flashinfer"), ModuleType("flashinfer.fused_moe")
    vars(package).update(__version__=RELEASE)
    vars(fused_moe).update(
        cutlass_fused_moe=without_situ,
        interleave_moe_weights_for_sm90_mixed_gemm=lambda w, _: interleave_weights_sm90(w, generation),
        interleave_moe_scales_for_sm90_mixed_gemm=lambda s, _: fold_scales_sm90(s, generation),
    )
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", fused_moe)
    goldens = open_goldens()
    names = ("geglu_special_values", "geglu_with_biases", "situ_special_values", "situ_beta_alone")
    cases = [goldens.load(f"step_and_situ/{name}") for name in names]
    for result, case in zip(run(flashinfer_kernel("cpu"), cases).results, cases, strict=True):
        experts = case.call().experts
        if experts.fc1_biases is not None or experts.fc2_biases is not None:
            lacking = ["fc1_expert_biases", "fc2_expert_biases"]
        else:
            lacking = [
                name for name in PARAMETERS if getattr(experts, name) is not None and name != "swiglu_limit"
            ]
        assert result.status == ("skipped" if lacking else "equal"), result
        assert all(name in result.message for name in lacking), result
