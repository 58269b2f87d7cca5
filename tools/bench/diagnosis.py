"""How long a diagnosis takes on a layer of real size, and whether it names the defect that is in it.

    python tools/bench/diagnosis.py deepseek_v4_flash --tokens 8 --tokens 64 limit_ignored bf16_finalize

A layer of random weights, a kernel that has the defect, and `diagnose` without a hint. One line each: seconds, the
names that predict every bit, and what was not tried.
"""

from __future__ import annotations

import sys
import time

import click
import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward
from mxfp4ref.conformance import diagnose
from mxfp4ref.defects import get_defect
from mxfp4ref.formats.experts import Sm90Experts
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90

# Sizes before and after padding (hidden, intermediate), experts, experts a token.
LAYERS = {
    "deepseek_v4_flash": ((4096, 2048), (4096, 2048), 256, 6),
    "gpt_oss_120b": ((2880, 2880), (3072, 2944), 128, 4),
}


def make_experts(layer: str, count: int, *, sm90: bool) -> Experts:
    """Random experts of a layer, with zeros in its padding; for gpt-oss with biases and all parameters."""
    random = torch.Generator().manual_seed(0)
    used, (hidden, inner), _, _ = LAYERS[layer]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(torch.bfloat16)

    def gemm(halves: int, rows: tuple[int, int], depth: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of one expert; sizes are (used, padded)."""
        packed = torch.randint(256, (halves, rows[1], depth[1] // 2), dtype=torch.uint8, generator=random)
        packed[:, rows[0] :] = 0
        packed[:, :, depth[0] // 2 :] = 0
        scales = (118, 124), (halves * rows[1], depth[1] // 32)
        weights = packed.flatten(0, 1)
        folded = torch.randint(*scales[0], scales[1], dtype=torch.uint8, generator=random)
        if sm90:
            return interleave_weights_sm90(weights[None])[0], fold_scales_sm90(folded[None])[0]
        return weights, folded

    tensors: dict[str, Tensor] = {}
    for expert in range(count):
        sizes = {
            "fc1": (2, (used[1], inner), (used[0], hidden)),
            "fc2": (1, (used[0], hidden), (used[1], inner)),
        }
        for name, size in sizes.items():
            for kind, tensor in zip(("weights", "scales"), gemm(*size), strict=True):
                whole = tensors.setdefault(f"{name}_{kind}", tensor.new_empty(count, *tensor.shape))
                whole[expert] = tensor
    if layer == "gpt_oss_120b":
        tensors |= {"fc1_biases": normal(count, 2 * inner), "fc2_biases": normal(count, hidden)}
        tensors["fc1_biases"].view(count, 2, inner)[:, :, used[1] :] = 0
        tensors["fc2_biases"][:, used[0] :] = 0
        parameters = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}
    else:
        parameters = {"swiglu_limit": 10.0}
    tensors |= {name: torch.full((count,), value) for name, value in parameters.items()}
    return (Sm90Experts if sm90 else Experts)(**tensors)


def make_call(layer: str, experts: Experts, tokens: int) -> MoeCall:
    random = torch.Generator().manual_seed(tokens)
    (hidden, _), _, _, top_k = LAYERS[layer]
    x = torch.randn(tokens, experts.hidden_size, generator=random).to(torch.bfloat16)
    x[:, hidden:] = 0
    ids = torch.rand(tokens, experts.num_experts, generator=random).topk(top_k).indices.to(torch.int32)
    scales = torch.rand(tokens, top_k, generator=random).softmax(1)
    return MoeCall(x, ids, scales, experts)


@click.command(help=__doc__)
@click.argument("layer", type=click.Choice(tuple(LAYERS)))
@click.argument("defects", nargs=-1, required=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, default=(8,), show_default=True)
@click.option("--experts", "count", type=click.IntRange(8), help="Fewer than the layer has.")
@click.option("--sm90", is_flag=True, help="Weights and scales in the layout of the real call.")
def main(
    layer: str, defects: tuple[str, ...], tokens: tuple[int, ...], count: int | None, sm90: bool
) -> None:
    experts = make_experts(layer, count or LAYERS[layer][2], sm90=sm90)
    missed = 0
    for number in tokens:
        call = make_call(layer, experts, number)
        start = time.perf_counter()
        expected = forward(call)
        click.echo(
            f"{layer}, {experts.num_experts} experts, {number} tokens: forward {time.perf_counter() - start:.1f} s"
        )
        for name in defects:
            output = get_defect(name).run(call)
            start = time.perf_counter()
            found = diagnose("moe", call, {"output": output}, {"output": expected})
            seconds = time.perf_counter() - start
            missed += name not in found.exact
            remarks = [
                words for words in found.patterns if words.startswith("named defects") or "not tried" in words
            ]
            click.echo(
                f"{name:24} {seconds:6.1f} s  {', '.join(found.exact) or 'unnamed'}  {'; '.join(remarks)}"
            )
            click.echo(f"{'':24} {found.stage}")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
