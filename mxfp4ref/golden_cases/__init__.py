"""The definitions of all golden cases, one module a suite.

`DEFINITIONS` has them by "suite/name" in the order in which they are defined; `BUILTIN` names the few that are
part of the installed package.
"""

from mxfp4ref.golden_cases import (
    activation,
    finalize,
    formats,
    gemm,
    layouts,
    models,
    parallel,
    routing,
    tensor_cores,
)
from mxfp4ref.golden_cases.definition import DEFINITIONS, Content, Definition

__all__ = ["BUILTIN", "DEFINITIONS", "SUITES", "Content", "Definition"]

# In the order in which data flows; importing them registers their cases.
SUITES = (formats, layouts, tensor_cores, gemm, activation, finalize, routing, parallel, models)

BUILTIN = (
    "activation/gpt_oss_special_values",
    "finalize/biases_inside_weight",
    "formats/every_code_by_row",
    "formats/every_code_every_scale_ocp_bfloat16",
    "gemm/mirrored_hidden_384",
    "layout/fold_scales_0_6_16",
    "layout/interleave_weights",
    "parallel/sentinels_on_rank_3_of_4",
    "routing/deepseek_v4_flash",
)
