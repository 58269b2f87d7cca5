"""Hypotheses on the pipeline along K: tiles of an operand that are those of another stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import shifted
from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis, Pipeline
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall

__all__ = ["k_stage_hypotheses"]

_TILES, _MOST = (64, 32, 128), 8  # numbers of K; stages
_At = Callable[[int], Tensor]  # the size of K to the number that is read for each


def k_stage_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of the input, the activation, or either GEMM's weights, with scales or without."""
    experts = call.experts
    for words, stages, depth, change in (
        ("the activation that GEMM2 reads", ("activation", "fc2"), experts.intermediate_size, _activation),
        ("the input that GEMM1 reads", ("input", "fc1"), experts.hidden_size, _input),
        (
            "GEMM2's weights with their scales",
            ("fc2",),
            experts.intermediate_size,
            _weights("fc2", "weights", "scales"),
        ),
        (
            "GEMM1's weights with their scales",
            ("fc1",),
            experts.hidden_size,
            _weights("fc1", "weights", "scales"),
        ),
        (
            "GEMM2's weights (codes without the scales)",
            ("fc2",),
            experts.intermediate_size,
            _weights("fc2", "weights"),
        ),
        (
            "GEMM1's weights (codes without the scales)",
            ("fc1",),
            experts.hidden_size,
            _weights("fc1", "weights"),
        ),
        ("GEMM2's scales", ("fc2",), experts.intermediate_size, _weights("fc2", "scales")),
        ("GEMM1's scales", ("fc1",), experts.hidden_size, _weights("fc1", "scales")),
    ):
        for tile in _TILES:
            for by in (n * sign for n in range(1, _MOST + 1) for sign in (1, -1)):
                if abs(by) * tile >= depth or (by < 0 and "weights" in words):  # which is tried elsewhere
                    continue
                which = f"{abs(by)} {'further on' if by > 0 else 'before'}"
                why = "a stage released too early" if by > 0 else "a stage not waited for"
                yield Hypothesis(
                    "K groups",
                    stages,
                    f"{words}: in each K tile of {tile} it is that of the tile {which}, where there is one ({why})",
                    change(lambda n, t=tile, b=by: shifted(n, t * b)),
                    1.5 + 0.02 * abs(by) + 0.01 * (tile != 64),
                )


def _activation(at: _At) -> Change:
    def on(pipeline: Pipeline) -> Pipeline:
        before = pipeline.stages.round_activation

        def rounded(values: Tensor) -> Tensor:
            right = before(values)
            return right[:, at(right.shape[1]).to(right.device)]

        return pipeline.staging(round_activation=rounded)

    return on


def _input(at: _At) -> Change:
    return lambda p: p.calling(input=p.call.input[:, at(p.call.input.shape[1]).to(p.call.input.device)])


def _weights(fc: str, *kinds: str) -> Callable[[_At], Change]:
    def change(at: _At) -> Change:
        def on(name: str, tensor: Tensor) -> Tensor:
            size = GROUP_SIZE // 2 if name.endswith("weights") else 1  # bytes of a K group
            groups = at(tensor.shape[2] // size * GROUP_SIZE)[::GROUP_SIZE] // GROUP_SIZE
            parted = tensor.unflatten(2, (-1, size))  # type: ignore[no-untyped-call]
            found: Tensor = parted[:, :, groups.to(tensor.device)].flatten(2).contiguous()
            return found

        return mapped(tuple(f"{fc}_{kind}" for kind in kinds), on)

    return change
