"""The definitions of all golden cases, one module a suite.

`DEFINITIONS` has them by "suite/name" in the order in which they are defined; `BUILTIN` names the few that are
part of the installed package.
"""

from mxfp4ref.goldens.cases import (
    activation,
    finalize,
    formats,
    gemm,
    layout,
    models,
    parallel,
    routing,
    tensor_core,
)
from mxfp4ref.goldens.cases.definition import DEFINITIONS, Content, Definition

__all__ = ["BUILTIN", "DEFINITIONS", "SUITES", "Content", "Definition"]

# In the order in which data flows; importing them registers their cases.
SUITES = (formats, layout, tensor_core, gemm, activation, finalize, routing, parallel, models)

# Chosen to catch as many defects as fit into 1.5 MB: 131 of 139 when this was written.
BUILTIN = (
    "activation/alpha_beta_at_rounding_boundaries",
    "finalize/unusual_weights",
    "formats/every_code_every_scale_ocp_bfloat16",
    "formats/scale_bytes_0_and_255",
    "gemm/underflow_in_gemm1",
    "gemm/wide_exponents",
    "layout/fold_scales_0_6_16",
    "layout/interleave_weights",
    "parallel/sentinels_on_rank_3_of_4",
    "routing/deepseek_v3_negative_scores_one_group",
    "routing/deepseek_v4_flash",
    "routing/deepseek_v4_pro_hash_layer_padded",
    "routing/gpt_oss_bf16_ties",
)
