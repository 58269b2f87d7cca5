"""Diagnosis by families: a wrong kernel is a stage, a place and a change.

`FAMILIES` says what kinds of changes are tried; each hypothesis is a point of one of them, and so are the named
defects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from mxfp4ref.conformance.source import written_defects

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """A kind of change.

    Attributes:
        name: as in `Hypothesis.family`.
        summary: what may happen, with which parameters.
        members: the named defects that belong to it.
    """

    name: str
    summary: str
    members: tuple[str, ...] = ()


_FAMILIES = (
    Family(
        "another expert's",
        "weights, scales, biases or SwiGLU parameters of another expert: the next one's, the first's for all, ...; "
        "or for some rows: a tile's first row's, those kept for equal counts, the neighbour's at a boundary; without "
        "a known rule as a table, by experts or blocks of rows",
        ("scales_of_next_expert", "params_of_first_expert", "params_by_global_id"),
    ),
    Family(
        "rows",
        "rows of a GEMM's weights, scales or bias in another order: shifted, swapped or reversed by 1 to 128, "
        "interleaved, transposed, in tiles or shards, behind padding, in another kernel's layout; some of a block "
        "for the others too; scales picked by a thread's lane; of up and gate together or of one",
        (
            *("gate_up_swapped", "gate_up_interleaved", "scales_not_swapped", "biases_not_swapped"),
            "ungated_halves_swapped",
            *("padding_end_of_fused", "weights_not_interleaved", "weights_interleaved_twice"),
            *("weights_interleaved_old", "scales_not_folded", "scales_folded_old", "scales_folded_new"),
        ),
    ),
    Family(
        "K groups",
        "K groups of 32, or codes within them, in another order; stale tiles of K",
        ("scale_off_by_one_group", "nibble_order", "nibble_split"),
    ),
    Family(
        "values",
        "other values: scales by a power of two, taken as 1, the first row's, of another format; codes without sign, "
        "cut off, of another table, transposed in blocks of 8 x 8, with signs or magnitudes of others; "
        "scales held in a smaller format; small weights lost; weights quantised again; biases doubled; "
        "SwiGLU parameters that are constants, or each other's",
        (
            *("scale_bias_125", "scale_truncated", "scale_as_integer", "scale_ocp_ends", "half_code_flushed"),
            *("codes_as_int4", "params_bf16", "limit_ignored", "alpha_ignored", "beta_ignored"),
            *("all_or_none_params", "bias1_ignored", "bias2_ignored", "subnormal_input_flushed"),
            *("limit_7_by_default", "no_limit_by_default", "situ_beta_ignored", "situ_linear_beta_ignored"),
        ),
    ),
    Family(
        "part of K",
        "some of K left out, rescaled, or another expert's: the tail, one group, one tile, every second group",
    ),
    Family("some rows", "some rows of fc1 left out, rescaled, or another row's, half's or expert's"),
    Family(
        "ids",
        "slots computed by another expert: the next one, ids modulo n, a neighbouring slot's or token's",
    ),
    Family(
        "ranks",
        "expert parallelism and padding: the rank's range off, slots of others or padded ones computed all the same",
        ("ep_double_mapping", "ep_sentinel_aliases", "ep_offset_dropped", "ep_ids_modulo"),
    ),
    Family(
        "dropped slots",
        "slots left out or added twice: the last of a token, rows beyond the first n of an expert, small weights, "
        "one expert; or GEMM2's rows of them, beside an fc2 bias",
        ("last_slot_dropped",),
    ),
    Family(
        "rows of an expert",
        "rows taken from another place, among their expert's, all sorted rows or slots: shifted, modulo n, divided "
        "by top-k, blocks swapped, for the result or for GEMM2's or GEMM1's input; "
        "the first or last n left out, where their number is a multiple; accumulators or workspaces of earlier ones; "
        "or from where wrong offsets of the experts' rows say: padded, without carry, in too few bits, the next's; "
        "elements exchanged in fragments, another swizzle, stale tiles of K, a part of K from another row",
    ),
    Family(
        "permuted slots",
        "GEMM2's rows, routing weights or input rows in the order of the sorted slots where that of the slots is "
        "meant, the other way round, or by the permutation for its inverse",
    ),
    Family(
        "routing weights",
        "routing weights not applied, applied twice, normalised again, rounded, another slot's or token's, "
        "applied at another place, read with another stride or by chunks of tokens, or not for tokens of n slots",
        ("weights_bf16", "weight_before_gemm2", "weight_in_gemm2_epilogue"),
    ),
    Family(
        "fc2 bias",
        "the fc2 bias added twice, without the weight, for one slot only, on every rank, for slots without an expert "
        "here, divided by the number of ranks, or read as another dtype or with another stride",
        ("bias2_unweighted", "bias2_on_every_tp_rank", "bias2_before_rounding", "bias2_bf16"),
    ),
    Family(
        "sum of slots",
        "the sum over a token's slots in another order, or overwritten; weights that multiply the sum so far",
        (
            *("finalize_unfused", "finalize_slots_reversed", "finalize_by_expert", "finalize_by_weight"),
            *("finalize_pairwise", "finalize_float64", "no_ftz_finalize"),
        ),
    ),
    Family(
        "factor",
        "one factor too many, read off the ratio of the outputs, at each place where it could be",
        ("rsf_post_hoc",),
    ),
    Family(
        "output",
        "rows or columns of the output at another place, rotated, zero, stale or added up, or added onto the input; "
        "rows that are not written and keep the input; normalised again; NaN and infinities replaced",
        ("nan_as_7fc0", "nan_as_ffc0", "minus_zero_kept"),
    ),
    Family(
        "input",
        "rows or columns of the input at another place or pitch, in tiles, rotated, zero, stale or added up; "
        "normalised again; NaN and infinities replaced",
    ),
    Family("GEMM1's output", "columns of GEMM1's output, or tiles of them, at another place"),
    Family("GEMM2's input", "columns of the activation, or tiles of them, at another place, or rotated"),
    Family(
        "GEMM2's output", "columns of GEMM2's output at another place, or added to those of the tile after"
    ),
    Family(
        "activation",
        "another activation of the kernel; clamps of up and gate on one side, both, none, or zero beyond the limit; "
        "sigmoid, one branch for both signs, GELU, ReLU and approximations; columns activated twice; alpha and beta "
        "at other places; bias to one half, twice, after the clamp; up and gate exchanged; parameters by slot, token "
        "or row; the exponential by a polynomial; steps in another order, each in float16 or bf16; NaN of a large "
        "gate",
        ("activation_type_ignored",),
    ),
    Family(
        "rounding",
        "cut instead of rounded, by way of float16, float8, tf32 or some bits of mantissa, ties away, at each "
        "place where a number is rounded, of up or gate alone, one rounding more or less",
        (
            *("gemm1_kept_fp32", "act_kept_fp32", "gemm2_kept_fp32", "fc1_truncated", "activation_truncated"),
            *("fc2_truncated", "output_truncated", "round_half_away", "bf16_saturates", "activation_fp16"),
            *("bf16_finalize", "weighted_rows_bf16"),
        ),
    ),
    Family(
        "order of sums",
        "K in n parts, interleaved, as a tree, descending, partial sums in bf16 or float16, not cleared, or scaled "
        "after other numbers of steps or in the exponent field",
    ),
    Family(
        "tiles",
        "tiles of GEMM2, of rows of an expert and columns: the last wave, every n-th or one not computed or added "
        "twice; stored in another raster",
    ),
    Family(
        "two",
        "two changes at once, where one explains a part: of a case, beside any weighted sum, or some of the cases",
    ),
)


_BY_MODULE = {
    **dict.fromkeys(("activation", "step_and_situ", "ungated"), "activation"),
    "gemm": "order of sums",
    "finalize": "sum of slots",
}


def _with_members() -> dict[str, Family]:
    """The other defects go to the family of the module that they are written in."""
    known = {name for family in _FAMILIES for name in family.members}
    found = {family.name: family for family in _FAMILIES}
    for module, name in _BY_MODULE.items():
        more = [d.name for d in written_defects().values() if d.module == module and d.name not in known]
        found[name] = replace(found[name], members=(*found[name].members, *more))
    return found


FAMILIES: Mapping[str, Family] = MappingProxyType(_with_members())


def family_of(defect: str) -> Family | None:
    """The family of a named defect; None of those of routing and dequantisation."""
    return next((family for family in FAMILIES.values() if defect in family.members), None)
