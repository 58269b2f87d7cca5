"""What a server gave for a layer of a checkpoint, held against it: the router's decision, then the kernel's output.

    check_served(open_layer("model", 3), "hidden.safetensors", "served.safetensors").verdict

The output is expected for the ids and weights that were served, where the file has them: what the router did wrong is
not held against the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._choices import DIAGNOSES, Diagnosing, RouterName
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.router import gate_of, router_to_run
from mxfp4ref.checkpoint.run import (
    OUTPUTS,
    ROUTER_INPUTS,
    ROUTING,
    check_whose_output,
    layer_call,
    read_input,
    route_input,
    run_layer,
)
from mxfp4ref.checkpoint.shards import CheckpointError
from mxfp4ref.checkpoint.writing import open_of_others
from mxfp4ref.conformance.comparison import differing, in_words, ulp_distance
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.conformance.plain import of_exception
from mxfp4ref.conformance.report_text import case_lines
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.conformance.router_bounds import routing_outside
from mxfp4ref.conformance.routing_words import routing_finding
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.engine.unshown import shown_by_layer, unshown
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing.route import PADDING_ID

__all__ = ["Served", "ServedOptions", "check_served"]

_ROUNDINGS = 8  # ulp, within which weights of the right ids tell only how the router's logits were rounded
_ALL_ZERO = "all of the output is zero, which proves nothing"
_NOT_TOLD_APART = (
    f"the file has no {' and '.join(ROUTING)}: with them, the router's mistakes are told from the experts'"
)


@dataclass(frozen=True)
class ServedOptions:
    """How a served output is compared: `router` and `ranks` as for `run_layer`, `diagnosis` as for `replay`.

    Attributes:
        router: the router to expect; None for the layer's own.
        ranks: whose output it is.
        diagnosis: "full", "quick" or "none".
        step: as of `run_layer`; and before a diagnosis, with 0 parts.
    """

    router: RouterName | None = None
    ranks: Ranks = field(default_factory=Ranks)
    diagnosis: Diagnosing = "full"
    step: Callable[[str, int], None] | None = None

    def __post_init__(self) -> None:
        check_choice("diagnosis", self.diagnosis, DIAGNOSES)


@dataclass(frozen=True)
class Served:
    """What came of a served layer: `lines` for each tensor and what differs, a verdict, and whether all is right."""

    lines: tuple[str, ...]
    verdict: str
    ok: bool


def check_served(
    layer: CheckpointLayer,
    input_path: str | Path | Mapping[str, Tensor],
    served_path: str | Path | Mapping[str, Tensor],
    options: ServedOptions | None = None,
    *,
    result: Mapping[str, Tensor] | None = None,
) -> Served:
    """Compare what a server gave with the layer's output, bit by bit, and diagnose what differs.

    Args:
        layer, input_path: as for `run_layer`.
        served_path: a safetensors file, or tensors by name: one of `routed_output`, `output` and `rank_output`
            `[M, H] bf16`, and, if they are known, `token_selected_experts` and `token_final_scales` `[M, k]`, which
            are compared first. Where both are there, the output is expected for them.
        options: how to compare.
        result: what `run_layer` gave for the same, if it has been run.

    Raises:
        TypeError, ValueError, CheckpointError: as `run_layer` does; or the served tensors have no output, or others
            than fit the layer.
    """
    how = options or ServedOptions()
    given = read_input(input_path)
    served = _read(served_path)
    check_whose_output(served, layer, how.ranks)
    if result is None:
        result = run_layer(layer, given, router=how.router, ranks=how.ranks, step=how.step)
    name = next(name for name in OUTPUTS if name in result)
    found = name if name in served else next(name for name in OUTPUTS if name in served)
    got = check_tensor(found, served[found], dtype=torch.bfloat16, shape=tuple(result[name].shape))
    if not got.numel():
        raise ValueError(f"{found}: expected the output of one token or more, got {list(got.shape)}")
    lines = [f"{other}: not compared" for other in sorted(served.keys() - {found, *ROUTING})]
    lines += [] if found == name else [f"{found}: taken for the layer's {name}"]
    routing_lines, wrong_routing = _routing(layer, given, served, result, how)
    if _no_experts(served.get(ROUTING[0]), layer):
        lines += [*routing_lines, f"{found}: not compared: the ids in the file are no routing"]
        return Served(tuple(lines), f"the router is wrong: {wrong_routing}", False)
    routed = {one: served[one] for one in ROUTING if one in served}
    # slots of the router, before those of the shared expert
    chosen = result[ROUTING[0]].shape[1] - layer.fused
    both = len(routed) == len(ROUTING) and all(
        _same(tensor[:, chosen:], result[one][:, chosen : tensor.shape[1]]) for one, tensor in routed.items()
    )
    expected = result[name]
    if both:
        given = {key: tensor for key, tensor in given.items() if key not in ROUTER_INPUTS}
        given |= {one: tensor[:, :chosen].contiguous() for one, tensor in routed.items()}
        how = replace(how, router=None)
        if not all(_same(given[one], result[one][:, :chosen]) for one in ROUTING):
            expected = run_layer(layer, given, ranks=how.ranks, step=how.step)[name]
    compared = _output(layer, given, got, expected, how)
    by = " for the ids and weights in the file" if both else ""
    lines += [*routing_lines, f"{found}{',' * both}{by}: {compared.words}", *compared.told]
    if not compared.equal and len(routed) < len(ROUTING):
        lines.append(_NOT_TOLD_APART)
    if not bool(got.any()):
        lines.append(_nothing_to_compute(layer, result) or _ALL_ZERO)
    elif compared.equal:
        lines += unshown([shown_by_layer(layer, given, how.router)])
    verdicts = [f"the router is wrong: {wrong_routing}"] if wrong_routing else []
    if not compared.equal:
        verdicts.append(f"the output is wrong{by}" + (f": {compared.said}" if compared.said else ""))
    elif wrong_routing and both:
        verdicts.append("the output is right for its ids and weights")
    whose = "the rank's part of the layer's" if name == "rank_output" else "the layer's"
    right = f"equal: the output is {whose} in every bit"
    return Served(tuple(lines), "; ".join(verdicts) or right, not verdicts)


def _read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The served tensors, one of which is an output."""
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        shards = open_of_others(source)
        tensors = shards.read(shards.files)
    outputs = [name for name in OUTPUTS if name in tensors]
    if len(outputs) != 1:
        raise CheckpointError(
            f"{'served' if isinstance(source, Mapping) else source}: expected one of {', '.join(OUTPUTS)}, "
            f"got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    whole = not one.is_floating_point()
    return torch.equal(one.long(), other.long()) if whole else not bool(differing(one, other).any())


def _routing(
    layer: CheckpointLayer,
    given: Mapping[str, Tensor],
    served: Mapping[str, Tensor],
    result: Mapping[str, Tensor],
    how: ServedOptions,
) -> tuple[list[str], str]:
    """A line for each of ids and weights that were served, and what is wrong with them; "" if nothing is."""
    expected: dict[str, Tensor] = {}
    for name in ROUTING:
        if name not in served:
            continue
        expected[name] = result[name]
        if layer.fused and served[name].shape[1:] == (result[name].shape[1] - layer.fused,):
            expected[name] = result[name][:, : -layer.fused]  # without the slots of the shared expert
        dtype = (torch.int32, torch.int64) if name == ROUTING[0] else torch.float32
        check_tensor(name, served[name], dtype=dtype, shape=tuple(expected[name].shape))
    if said := _no_experts(served.get(ROUTING[0]), layer):
        return [f"{ROUTING[0]}: {said}"], said
    got = {name: served[name].to(expected[name].dtype) for name in expected}
    lines = [f"{name}: {in_words(got[name], expected[name])}" for name in expected]
    if all(_same(got[name], expected[name]) for name in expected):
        return lines, ""
    ids, weights = (got.get(name, result[name]) for name in ROUTING)
    if torch.equal(ids, expected.get(ROUTING[0], ids)) and ROUTING[1] in expected:
        most = int(ulp_distance(weights, expected[ROUTING[1]]).max())
        if most <= _ROUNDINGS:
            return [*lines, f"the router is right: weights up to {most} ulp off are roundings"], ""
    case = _routing_case(layer, given, how) if len(expected) == 2 else None
    if case is None:
        return lines, _PLAIN
    outputs = {"ids": ids, "scales": weights}
    if not routing_outside(case, outputs):
        return [
            *lines,
            "the router is right: a correct float32 evaluation may give these ids and weights",
        ], ""
    wanted = {"ids": result[ROUTING[0]], "scales": result[ROUTING[1]]}
    if said := routing_finding(case, outputs, wanted).sentence:
        return lines, said
    if "logits" in given:
        return lines, _factor(outputs, wanted) or _PLAIN
    # As a router in float32 sums up, which changes small weights more than roundings do.
    rounded = {**case, "logits": given["hidden"].to(torch.float32) @ layer.router_weight.to(torch.float32).T}
    said = _factor(outputs, wanted) or routing_finding(rounded, outputs, wanted).sentence
    return [*lines, *([] if said else [_OTHER_LOGITS])], said or _PLAIN


def _no_experts(ids: Tensor | None, layer: CheckpointLayer) -> str:
    """Which id is no expert's, or which token names one twice, in words; "" if the kernel may be given them all."""
    if ids is None:
        return ""
    outside = (ids < PADDING_ID) | (ids >= layer.num_experts + layer.fused)
    if bool(outside.any()):
        token, slot = outside.nonzero()[0].tolist()
        return f"id {int(ids[token, slot])} at token {token}, slot {slot} is no expert's"
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    token = int(twice.nonzero()[0]) if bool(twice.any()) else -1
    return f"token {token} names an expert twice: {ids[token].tolist()}" if token >= 0 else ""


def _factor(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """The factor between weights of equal ids, wherever roundings leave it clear, in words."""
    if not torch.equal(got["ids"], want["ids"]):
        return ""
    ratios = (got["scales"].to(torch.float64) / want["scales"].to(torch.float64))[want["scales"] != 0]
    factor = float(ratios.median()) if ratios.numel() else 1.0
    apart = (ratios / factor - 1).abs().max() if ratios.numel() else 0.0
    one = abs(factor - 1) < _CLEAR
    return "" if one or not apart < _CLEAR else f"ids are right; all weights are {factor:.4g}x the right ones"


_CLEAR = 2.0**-12
_OTHER_LOGITS = "if the server's logits are others, as bf16 ones are: put them into the input, as logits"
_PLAIN = "its ids or weights differ"


def _routing_case(
    layer: CheckpointLayer, given: Mapping[str, Tensor], how: ServedOptions
) -> dict[str, Any] | None:
    """The router's inputs as a golden case has them; None where no search knows such a router."""
    logits, _ = route_input(layer, given, None if ROUTING[0] in given else how.router)
    if logits is None or layer.fused or "image_mask" in given:
        return None
    preset = router_to_run(layer, how.router)
    if preset.normalize == "none":
        return None
    gate = gate_of(layer, how.router)
    tables = {} if gate.tid2eid is None else {"tid2eid": gate.tid2eid, "token_ids": given["token_ids"]}
    return {
        "preset": replace(preset, temperature=1.0),
        "logits": logits.to(torch.float32) / preset.temperature,
        "correction_bias": gate.correction_bias,
        "padded": given.get("padded"),
        **tables,
        **({} if "logits" in given else {"logit_errors": _logit_errors(layer, given["hidden"], logits)}),
    }


def _logit_errors(layer: CheckpointLayer, hidden: Tensor, logits: Tensor) -> Tensor:
    """How far logits that a server summed up in float32, in some order, may lie from these.

    sqrt(K) units of the sum of the products' magnitudes, which sums of random roundings stay below (Higham and Mary,
    2019); sums in blocks, as GPUs have them, are far within. Logits in bf16, as gpt-oss has them, are rounded then.
    """
    x, weights = hidden.to(torch.float64), layer.router_weight.to(torch.float64)
    errors: Tensor = x.abs() @ weights.abs().T * (hidden.shape[1] ** 0.5 * 2.0**-24)
    if logits.dtype != torch.bfloat16 or layer.router_bias is None:
        return errors
    exact = x @ weights.T + layer.router_bias.to(torch.float64)
    ends = [(exact + sign * errors).to(torch.bfloat16).to(torch.float64) for sign in (-1, 1)]
    return torch.maximum(*((end - logits.to(torch.float64)).abs() for end in ends))


@dataclass(frozen=True)
class _Compared:
    """How the output differs, in words; what is wrong, in lines, and what the diagnosis found, or ""."""

    words: str
    equal: bool = False
    told: tuple[str, ...] = ()
    said: str = ""


def _output(
    layer: CheckpointLayer,
    given: Mapping[str, Tensor],
    got: Tensor,
    expected: Tensor,
    how: ServedOptions,
) -> _Compared:
    if not bool(differing(got, expected).any()):
        return _Compared("equal", True)
    ranks = how.ranks
    if ranks.ep_size > 1 or (ranks.tp_size > 1 and ranks.tp_rank is None) or "shared_output" in given:
        why = (
            "not diagnosed: it is a sum. One rank's own output is, with --experts and --tp-rank, and a routed_output "
            "without the shared expert's"
        )
        return _Compared(in_words(got, expected), told=(why,))
    call = layer_call(layer, given, router=how.router, ranks=ranks)
    got = F.pad(got, (0, call.experts.hidden_size - layer.hidden_size))
    if fits := fitting_kernels(call, got, first=True):
        return _Compared(f"equal, by K tiles {fits[0]}", True)
    if how.step is not None:
        how.step("now the diagnosis", 0)
    call = replace(call, kernel=closest_kernel(call, got))
    want = forward(call)
    words = in_words(got[:, : layer.hidden_size], want[:, : layer.hidden_size])
    if how.diagnosis == "none":
        return _Compared(words)
    try:
        found = diagnose("moe", call, {"output": got}, {"output": want}, diagnosis=how.diagnosis)
    except Exception as error:  # of an output that nobody has thought of; that it is wrong is known
        return _Compared(words, told=(f"no diagnosis: {of_exception(error)}",))
    result = CaseResult(
        case="served", kind="moe", why="", status="differs", elements=got.numel(), diagnosis=found
    )
    said = str(found.finding) if found.finding.sentence else ""
    return _Compared(words, told=tuple(case_lines(result)[1:]), said=said)


def _nothing_to_compute(layer: CheckpointLayer, result: Mapping[str, Tensor]) -> str:
    if layer.expert_ids is None:
        return ""
    mine = torch.tensor([*layer.expert_ids, PADDING_ID], device="cpu")[:-1]
    if bool(torch.isin(result[ROUTING[0]].long(), mine).any()):
        return ""
    return "no token has an expert of this rank: its output is zeros, which proves nothing"
