"""The definitions of all golden cases, one module a suite.

`DEFINITIONS` has them by "suite/name" in the order in which they are defined.
"""

from mxfp4ref.goldens.cases import (
    activation,
    finalize,
    formats,
    gemm,
    gpt_oss,
    layout,
    models,
    options,
    parallel,
    routing,
    sizes,
    step_and_situ,
    tensor_core,
    tile_n,
    ungated,
    w4a8,
)
from mxfp4ref.goldens.cases.definition import DEFINITIONS, Content, Definition

__all__ = ["DEFINITIONS", "SUITES", "Content", "Definition"]

# In the order in which data flows; importing them registers their cases.
SUITES = (
    *(formats, layout, tensor_core, gemm, activation, step_and_situ, ungated, finalize, routing, parallel),
    *(sizes, gpt_oss, models, tile_n, w4a8, options),
)
