"""Suite `tile_n`: outputs that depend on the N tile, for kernels that are told theirs.

Whether the first or the second of the first two groups' products is rounded alone depends, in some rows, on the N
tile of the kernel's tactic (docs/arithmetic.md, section 3). That shows only where such a product leaves float32's
range, and no kernel that chooses its own tiles is held against these cases.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall

_ROWS = 34  # beyond an N tile of 32, so that its row 32 is the tile's row 0 again


def _call() -> MoeCall:
    """GEMM2's second group is minus the first, or minus half of it, and all other groups are zero."""
    source = Source("tile_n/first_groups_overflow")
    experts = source.experts(1, 128, 512, fc1_scales=(120, 122), fc2_scales=(252, 254))
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    changed = {name: getattr(experts, name).clone() for name in ("fc1_weights", "fc1_scales", "fc2_weights")}
    for name in ("fc1_weights", "fc1_scales"):  # activations 32 to 63 are those from 0 on
        by_half = changed[name].view(1, 2, 512, -1)
        by_half[:, :, 32:64] = by_half[:, :, :32]
    changed["fc2_weights"][..., 16:32] = changed["fc2_weights"][..., :16] ^ 0x88
    changed["fc2_weights"][..., 32:] = 0
    scales = experts.fc2_scales.clone()
    scales[..., 1] = scales[..., 0] - (torch.arange(128) % 2).to(torch.uint8)
    return MoeCall(
        source.normal("input", _ROWS, 128),
        torch.zeros(_ROWS, 1, dtype=torch.int32),
        source.weights(_ROWS, 1),
        replace(experts, fc2_scales=scales, **changed),
    )


for _tile_n in (16, 32, 64, 128):

    @define(
        why=f"N tiles of {_tile_n}: the first two groups' products of GEMM2 overflow and would cancel; by the "
        "row's position in its tile one of them is rounded alone, and the sum is +Inf or -Inf. "
        f"{_ROWS} rows of one expert.",
        unique_for="the N tile alone",
        name=f"first_groups_overflow_{_tile_n}",
    )
    def _(source: Source, tile_n: int = _tile_n) -> Content:
        return moe_content(_call(), compact=True, tile_n=tile_n)
