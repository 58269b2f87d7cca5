"""What a server gave for a layer of a checkpoint, held against it: the router's decision, then the kernel's output.

    check_served(open_layer("model", 3), "hidden.safetensors", "served.safetensors").verdict

The output is expected for the ids and weights that were served, where the file has them: what the router did wrong is
not held against the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._choices import DIAGNOSES, Diagnosing, RouterName
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.run import (
    OUTPUTS,
    ROUTER_INPUTS,
    ROUTING,
    check_whose_output,
    layer_call,
    read_input,
    run_layer,
)
from mxfp4ref.checkpoint.shards import CheckpointError
from mxfp4ref.checkpoint.writing import open_of_others
from mxfp4ref.conformance.comparison import differing, in_words
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.conformance.isolation.plain import of_exception
from mxfp4ref.conformance.reports.report_text import case_lines
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.engine.held_experts import other_experts, whose_output
from mxfp4ref.engine.served_routing import check_routing, from_local_ids, no_experts, same
from mxfp4ref.engine.unshown import shown_by_layer, unshown
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing.route import PADDING_ID

__all__ = ["Served", "ServedOptions", "check_served"]

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
        tell: called with each line of what comes of it, as soon as that is known.
    """

    router: RouterName | None = None
    ranks: Ranks = field(default_factory=Ranks)
    diagnosis: Diagnosing = "full"
    step: Callable[[str, int], None] | None = None
    tell: Callable[[str], None] | None = None

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
    lines = _Lines(how.tell)
    lines.add(*(f"{other}: not compared" for other in sorted(served.keys() - {found, *ROUTING})))
    lines.add(*([] if found == name else [f"{found}: taken for the layer's {name}"]))
    if ROUTING[0] in served and (local := from_local_ids(layer, served[ROUTING[0]], result[ROUTING[0]])):
        silent = replace(how, diagnosis="none", tell=None)
        global_ids = {found: got, **served, ROUTING[0]: result[ROUTING[0]]}
        compared = check_served(layer, given, global_ids, silent, result=result)
        if compared.ok:
            ids = f"{ROUTING[0]}: {local}; taken for the experts' numbers in the layer"
            lines.add(ids, *compared.lines[compared.lines[0].startswith(ROUTING[0]) :])
            return Served(
                tuple(lines.told), f"{compared.verdict}; only the ids in the file are {local}", True
            )
    wrong_routing = check_routing(layer, given, served, result, how.router, lines.add)
    if no_experts(served.get(ROUTING[0]), layer):
        lines.add(f"{found}: not compared: the ids in the file are no routing")
        return Served(tuple(lines.told), f"the router is wrong: {wrong_routing}", False)
    routed = {one: served[one] for one in ROUTING if one in served}
    # slots of the router, before those of the shared expert
    chosen = result[ROUTING[0]].shape[1] - layer.fused
    both = len(routed) == len(ROUTING) and all(
        same(tensor[:, chosen:], result[one][:, chosen : tensor.shape[1]]) for one, tensor in routed.items()
    )
    expected = result[name]
    if both:
        given = {key: tensor for key, tensor in given.items() if key not in ROUTER_INPUTS}
        given |= {one: tensor[:, :chosen].contiguous() for one, tensor in routed.items()}
        how = replace(how, router=None)
        if not all(same(given[one], result[one][:, :chosen]) for one in ROUTING):
            expected = run_layer(layer, given, ranks=how.ranks, step=how.step)[name]
    verdicts = [f"the router is wrong: {wrong_routing}"] if wrong_routing else []
    by = " for the ids and weights in the file" if both else ""
    if wrong_routing and bool(differing(got, expected).any()):
        lines.add(*verdicts)  # before a diagnosis, which takes long
    lines.head = f"{found}{',' * both}{by}: "
    equal, said = _output(layer, given, (got, expected), how, lines)
    if not equal and len(routed) < len(ROUTING):
        lines.add(_NOT_TOLD_APART)
    if not bool(got.any()):
        lines.add(_nothing_to_compute(layer, result) or _ALL_ZERO)
    elif equal:
        lines.add(*unshown([shown_by_layer(layer, given, how.router)]))
    if not equal:
        verdicts.append(f"the output is wrong{by}" + (f": {said}" if said else ""))
    elif wrong_routing and both:
        verdicts.append("the output is right for its ids and weights")
    whose = "the rank's part of the layer's" if name == "rank_output" else "the layer's"
    right = f"equal: the output is {whose} in every bit"
    return Served(tuple(lines.told), "; ".join(verdicts) or right, not verdicts)


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


class _Lines:
    """Lines that are told as they come; `head` is what those of the output begin with."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self.told, self.head, self._tell = list[str](), "", tell or (lambda line: None)

    def add(self, *lines: str) -> None:
        for line in lines:
            self.told.append(line)
            self._tell(line)


def _output(
    layer: CheckpointLayer,
    given: Mapping[str, Tensor],
    outputs: tuple[Tensor, Tensor],
    how: ServedOptions,
    lines: _Lines,
) -> tuple[bool, str]:
    """Whether the output is equal to the expected one, and if not what is found, or ""; lines say how it differs."""
    got, expected = outputs
    if not bool(differing(got, expected).any()):
        lines.add(f"{lines.head}equal")
        return True, ""
    ranks = how.ranks
    if ranks.ep_size > 1 or (ranks.tp_size > 1 and ranks.tp_rank is None) or "shared_output" in given:
        lines.add(f"{lines.head}{in_words(got, expected)}")
        if how.diagnosis != "none" and (said := whose_output(layer, given, got, how.router, ranks)):
            return False, said
        lines.add(
            "not diagnosed: it is a sum. One rank's own output is, with --experts and --tp-rank, and a routed_output "
            "without the shared expert's"
        )
        return False, ""
    call = layer_call(layer, given, router=how.router, ranks=ranks)
    got = F.pad(got, (0, call.experts.hidden_size - layer.hidden_size))
    if fits := fitting_kernels(call, got, first=True):
        lines.add(f"{lines.head}equal, by K tiles {fits[0]}")
        return True, ""
    call = replace(call, kernel=closest_kernel(call, got))
    want = forward(call)
    lines.add(f"{lines.head}{in_words(got[:, : layer.hidden_size], want[:, : layer.hidden_size])}")
    if how.diagnosis == "none":
        return False, ""
    if how.step is not None:
        how.step("now the diagnosis", 0)
    try:
        said = whose_output(layer, given, outputs[0], how.router, ranks) or other_experts(layer, call, got)
        if said:
            return False, said
        found = diagnose("moe", call, {"output": got}, {"output": want}, diagnosis=how.diagnosis)
    except Exception as error:  # of an output that nobody has thought of; that it is wrong is known
        lines.add(f"no diagnosis: {of_exception(error)}")
        return False, ""
    result = CaseResult(
        case="served", kind="moe", why="", status="differs", elements=got.numel(), diagnosis=found
    )
    lines.add(*case_lines(result)[1:])
    return False, str(found.finding) if found.finding.sentence else ""


def _nothing_to_compute(layer: CheckpointLayer, result: Mapping[str, Tensor]) -> str:
    if layer.expert_ids is None:
        return ""
    mine = torch.tensor([*layer.expert_ids, PADDING_ID], device="cpu")[:-1]
    if bool(torch.isin(result[ROUTING[0]].long(), mine).any()):
        return ""
    return "no token has an expert of this rank: its output is zeros, which proves nothing"
