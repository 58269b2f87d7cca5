"""Compare flashinfer up to 0.6.9 with the `PLAIN` kernel on random calls; needs a GPU and a build of that release.

The calls are those of `random_cases.py`. This release takes a scale byte 255 for NaN, which is not modelled, so that
254 takes its place. It tells of each call that differs, and keeps the kernel's outputs of some seeds for the tests.

    python tools/hardware/oldest_release.py --seconds 60 --output recorded.npz --keep 9 18 24
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_cases import random_call
from torch import Tensor

from mxfp4ref import MoeCall, Sm90Kernel, forward
from mxfp4ref.formats.generations import PLAIN
from mxfp4ref.formats.resize import to_sm90


def plain_call(seed: int) -> MoeCall:
    """The random call of a seed, without scale bytes of 255, for this kernel's one tactic."""
    call = random_call(seed)
    fc1, fc2 = call.experts.fc1_scales, call.experts.fc2_scales
    assert fc1 is not None
    assert fc2 is not None
    experts = replace(call.experts, fc1_scales=fc1.clamp(max=254), fc2_scales=fc2.clamp(max=254))
    return replace(call, experts=experts, kernel=Sm90Kernel(generation=PLAIN))


def kernels_output(function: Any, call: MoeCall) -> Tensor:
    """What the kernel gives: weights in logical order, scales folded and viewed as int32."""
    experts = to_sm90(call.experts, PLAIN).to("cuda")
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    x, output = call.input.cuda(), torch.empty_like(call.input, device="cuda")
    function(
        x,
        call.token_selected_experts.cuda(),
        call.token_final_scales.cuda(),
        experts.fc1_weights,
        experts.fc2_weights,
        torch.bfloat16,
        quant_scales=[scales.view(torch.int32) for scales in (experts.fc1_scales, experts.fc2_scales)],
        fc1_expert_biases=experts.fc1_biases,
        fc2_expert_biases=experts.fc2_biases,
        swiglu_alpha=experts.swiglu_alpha,
        swiglu_beta=experts.swiglu_beta,
        swiglu_limit=experts.swiglu_limit,
        tp_size=call.tp_size,
        tp_rank=call.tp_rank,
        ep_size=call.ep_size,
        ep_rank=call.ep_rank,
        use_w4_group_scaling=True,
        output=output,
    )
    return output.cpu()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, help="an .npz for the outputs of the seeds of --keep")
    parser.add_argument("--keep", type=int, nargs="*", action="extend", default=[], metavar="SEED")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: the real kernel runs nowhere else")
    flashinfer: Any = importlib.import_module("flashinfer")
    if flashinfer.__version__ not in PLAIN.releases:
        parser.error(f"expected flashinfer {' or '.join(PLAIN.releases)}, found {flashinfer.__version__}")
    function = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
    kept: dict[str, Any] = {}
    elements = seed = differing = 0
    start = time.monotonic()
    while time.monotonic() - start < arguments.seconds:
        call = plain_call(seed)
        got, expected = (t.view(torch.int16) for t in (kernels_output(function, call), forward(call)))
        elements += got.numel()
        if count := int((got != expected).sum()):
            differing += count
            print(f"seed {seed}: {count:,} of {got.numel():,} elements differ")
        if seed in arguments.keep:
            kept[f"seed_{seed}"] = got.numpy().view(np.uint16)
        seed += 1
    print(f"{seed} calls, {elements:,} elements, {differing:,} differ")
    if arguments.output is not None:
        np.savez_compressed(arguments.output, **kept)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
