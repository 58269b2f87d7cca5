"""Whether the bits of a token depend on what it is computed with: its batch, its place in it, the ranks.

found = invariance(call)
print(found.verdict)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref._validate import check_instance
from mxfp4ref.conformance.comparison import Difference, difference_at, differing
from mxfp4ref.engine.fitting import Fit, fitting_kernels, tile_k_kernels
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks, gather, rank_calls

__all__ = ["Invariance", "Variant", "invariance"]

Run = Callable[[MoeCall], Tensor]

_ALONE = 16  # tokens that are run alone, evenly spaced
_TP_COLUMNS = 128  # of the intermediate size, which each tensor-parallel rank of the kernel has a multiple of


@dataclass(frozen=True)
class Variant:
    """The same tokens, computed with other company.

    Attributes:
        name: how they were computed.
        elements, differing: output elements compared with those of the call, and how many have other bits.
        first: the first of them; None if there is none.
        why: what makes the difference, as far as bits tell.
        ranks: whether the sum over ranks is what differs, and not the batch.
    """

    name: str
    elements: int
    differing: int
    first: Difference | None = None
    why: str = ""
    ranks: bool = False


@dataclass(frozen=True)
class Invariance:
    """What was found.

    Attributes:
        variants: one for each way of computing the same tokens.
        tactics: pairs of K tiles, and in how many elements the oracle's bits for them are other than for the first:
            whoever lets the batch size choose among those with 0 keeps every bit.
    """

    variants: tuple[Variant, ...]
    tactics: tuple[tuple[str, int], ...]

    @property
    def ok(self) -> bool:
        """Whether no bit depends on the batch; sums over ranks do not count."""
        return not any(variant.differing for variant in self.variants if not variant.ranks)

    @property
    def verdict(self) -> str:
        if not any(variant.elements for variant in self.variants):
            return "there are no tokens, which tells nothing"
        changing = [v.name for v in self.variants if v.differing and not v.ranks]
        words = (
            "no bit depends on the batch" if self.ok else f"bits depend on the batch: {', '.join(changing)}"
        )
        same = [name for name, count in self.tactics if not count]
        other = [name for name, count in self.tactics if count]
        if other:
            words += f"; K tiles {', '.join(same)} give the same bits, {', '.join(other)} others"
        elif len(same) > 1:
            words += "; all pairs of K tiles give the same bits"
        ranks = [v.name for v in self.variants if v.ranks and v.differing]
        return words + (
            f"; {', '.join(ranks)} change bits, as each rank's output is rounded" if ranks else ""
        )


def invariance(call: MoeCall, run: Run = forward, *, ranks: tuple[int, ...] = (2,)) -> Invariance:
    """Compute the tokens of a call alone, in another order, among others, and on several ranks.

    Args:
        call: on one rank; with several the ranks are left out.
        run: gives the output `[M, H] bf16` of a call, by default the oracle.
        ranks: sizes of expert and of tensor parallelism; those that do not divide the layer are left out.

    Raises:
        TypeError: not a call.
        Whatever `run` raises.
    """
    check_instance("call", call, MoeCall)
    base = run(call)
    variants = [_compared(call, base, variant, run) for variant in _batches(call)]
    variants += [_ranks(call, base, sizes, run) for sizes in _rank_sizes(call, ranks)]
    outputs = {"{}x{}".format(*k.tile_k): forward(replace(call, kernel=k)) for k in tile_k_kernels(call)}
    first = next(iter(outputs.values()))
    tactics = tuple((name, int(differing(output, first).sum())) for name, output in outputs.items())
    return Invariance(tuple(variants), tactics if call.experts.tactics_show else ())


@dataclass(frozen=True)
class _Batch:
    """Calls that compute some tokens of a call: which tokens each has, and which of its rows are looked at."""

    name: str
    parts: tuple[tuple[Tensor, slice], ...]


def _batches(call: MoeCall) -> Iterator[_Batch]:
    count = call.num_tokens
    everything = torch.arange(count)
    if not count:
        return
    alone = torch.linspace(0, count - 1, min(count, _ALONE)).round().to(torch.int64)
    yield _Batch("alone", tuple((token[None], slice(0, 1)) for token in alone))
    yield _Batch("in reverse", ((everything.flip(0), slice(None)),))
    yield _Batch(
        "behind as many others", ((torch.cat([everything.flip(0), everything]), slice(count, None)),)
    )


def _compared(call: MoeCall, base: Tensor, batch: _Batch, run: Run) -> Variant:
    elements = count = 0
    first: Difference | None = None
    why = ""
    for tokens, rows in batch.parts:
        other = call.select(tokens.to(call.input.device))
        whole = run(other)
        output, want = whole[rows], base[tokens[rows]]
        wrong = differing(output, want)
        elements += want[other.written[rows]].numel()
        count += int(wrong.sum())
        if first is None and bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            first = replace(
                difference_at(output, want, (row, column)), index=(int(tokens[rows][row]), column)
            )
            why = _why(fitting_kernels(other, whole), fitting_kernels(call, base))
    return Variant(batch.name, elements, count, first, why)


def _why(here: tuple[Fit, ...], before: tuple[Fit, ...]) -> str:
    """What makes the difference between two outputs, by the tiles that fit each."""
    if not here or not before:
        return (
            "other bits than the SM90 kernel's: this kernel itself sums in an order that depends on the batch"
        )
    names, others = ({"{}x{}".format(*fit.kernel.tile_k) for fit in fits} for fits in (here, before))
    if not names & others:
        tiles, in_call = (" or ".join(sorted(some)) for some in (names, others))
        return f"another tactic: K tiles {tiles} here, {in_call} in the call"
    return "the row's position in its N tile, where the first two groups of K leave float32's range"


def _rank_sizes(call: MoeCall, ranks: tuple[int, ...]) -> Iterator[tuple[str, Ranks]]:
    if (call.ep_size, call.tp_size) != (1, 1):
        return
    for size in ranks:
        if size > 1 and call.experts.num_experts % size == 0:
            yield f"expert parallel, {size} ranks", Ranks(ep_size=size)
        if size > 1 and call.experts.intermediate_size % (_TP_COLUMNS * size) == 0:
            yield f"tensor parallel, {size} ranks", Ranks(tp_size=size)


def _ranks(call: MoeCall, base: Tensor, sizes: tuple[str, Ranks], run: Run) -> Variant:
    name, ranks = sizes
    output = gather([run(of_rank) for of_rank in rank_calls(call, ranks)])
    wrong = differing(output, base)
    first = difference_at(output, base, tuple(wrong.nonzero()[0].tolist())) if bool(wrong.any()) else None
    split = "the experts of a token" if ranks.ep_size > 1 else "the K of GEMM2"
    why = f"{split} are summed on several ranks, each of which rounds to bf16" if first else ""
    return Variant(name, base.numel(), int(wrong.sum()), first, why, ranks=True)
