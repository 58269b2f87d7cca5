"""Shadow: the real kernel answers, and the oracle looks at what it answered."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_int
from mxfp4ref.conformance.comparison import difference_at, differing
from mxfp4ref.engine.arguments import bind, capturing, lenient_call
from mxfp4ref.engine.counting import Counting
from mxfp4ref.engine.describing import local_ids, zeros_words
from mxfp4ref.engine.dump import write_call
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.engine.install import Kernel
from mxfp4ref.model.call import PADDING_ID, MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["Shadow"]

_CHANGING = ("input", "token_selected_experts", "token_final_scales")  # of each call; the rest is the layer's


@dataclass
class _Layer:
    """A layer, which is known by where its weights lie.

    Attributes:
        number: in the order in which layers were first called, from 1.
        calls: how many there were.
        reported: whether a difference was reported.
        last: the kernel that fitted the last call of so many tokens.
    """

    number: int
    calls: int = 0
    reported: bool = False
    last: dict[int, Sm90Kernel] = field(default_factory=dict)


@dataclass(frozen=True)
class _Due:
    """A call that is to be compared: its arguments as they were before the kernel ran."""

    layer: _Layer
    number: int
    given: dict[str, Any]
    call: MoeCall

    @property
    def forced(self) -> bool:
        """Whether the engine names the tactics."""
        return self.given.get("profile_ids") is not None and self.call.kernel.generation.forces_tactics


class Shadow:
    """Answers calls with the real kernel and compares; see `mxfp4ref.engine.shadow`."""

    def __init__(
        self, counting: Counting, *, every: int = 1, dump: Path | None = None, dumps: int = 4
    ) -> None:
        self._counting = counting
        self._every = check_int("every", every, minimum=1)
        self._dump = None if dump is None else dump.absolute()  # the server may change the working directory
        self._dumps = check_int("dumps", dumps, minimum=0)
        self._lock = threading.Lock()
        self._layers: dict[tuple[object, ...], _Layer] = {}

    @uncompiled
    def __call__(self, kernel: Kernel, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        due: _Due | str | Exception
        try:
            due = self._prepare(arguments, named)
        except Exception as error:
            due = error
        try:
            result = kernel(*arguments, **named)
        except Exception:
            if isinstance(due, Exception):
                self._counting.add(self._failed(due, "the oracle failed, and then the kernel"))
            raise
        try:
            if isinstance(due, Exception):
                raise due
            outcome = due if isinstance(due, str) else self._compare(due, result)
        except Exception as error:
            outcome = self._failed(error)
        self._counting.add(outcome)
        return result

    def _failed(self, error: Exception, what: str = "the oracle failed, the server did not") -> str:
        """Count what is not modelled, and what went wrong, which the log has once with its traceback."""
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError):
            self._counting.log(logging.WARNING, f"not compared: {error}", once=said)
            return "not_modelled"
        self._counting.log(logging.ERROR, f"{what}: {said}", once=said, traceback=True)
        return "failed"

    def _prepare(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> _Due | str:
        """What is to be compared after the kernel ran, or why nothing is, as `Counts` calls it."""
        if capturing(arguments, named):
            self._counting.log(
                logging.WARNING,
                "calls in CUDA graphs are not compared, neither while they are captured nor when they are replayed; "
                "for a check switch graphs off: --enforce-eager for vLLM, --disable-cuda-graph for sglang",
                once="graphs",
            )
            return "in_graphs"
        given = bind(arguments, named)
        layer, number = self._layer_of(given)
        if (number - 1) % self._every:
            return "not_due"
        # The kernel may write its output over its input.
        before = {name: given[name].clone() for name in _CHANGING if isinstance(given[name], Tensor)}
        given |= before
        call = lenient_call(given)
        if not call.experts.quantized:
            raise NotImplementedError(
                "fc1_expert_weights: bf16 weights, whose sums have no bits of their own"
            )
        return _Due(layer, number, given, call)

    def _layer_of(self, given: dict[str, Any]) -> tuple[_Layer, int]:
        """The layer of a call, and which of its calls this is."""
        weights = [given[f"{name}_expert_weights"] for name in ("fc1", "fc2")]
        key = tuple((tensor.device, tensor.data_ptr(), tensor.shape) for tensor in weights)
        with self._lock:
            layer = self._layers.setdefault(key, _Layer(len(self._layers) + 1))
            layer.calls += 1
            return layer, layer.calls

    def _compare(self, due: _Due, result: Any) -> str:
        returned = result[0] if isinstance(result, (list, tuple)) and result else result
        if wrong := _wrong_kind(due.call, returned) or _elsewhere(
            due.call, due.given.get("output"), returned
        ):
            self._counting.log(
                logging.WARNING, f"layer {due.layer.number}: {wrong}", once=f"{due.layer.number} {wrong}"
            )
            return "different"
        call, output = _well_defined(due.call, due.call.written_over(returned))
        if not output[call.written].numel():
            return "empty"
        kernel = call.kernel if due.forced else due.layer.last.get(call.num_tokens, call.kernel)
        if bool(differing(output, forward(replace(call, kernel=kernel))).any()):
            fits = () if due.forced else fitting_kernels(call, output, first=True)
            if not fits:
                kernel = kernel if due.forced else closest_kernel(call, output)
                self._report(due, replace(call, kernel=kernel), output, returned)
                return "different"
            due.layer.last[call.num_tokens] = fits[0].kernel
        if returned.numel() and not bool((returned != 0).any()):
            if local_ids(due.call):
                self._counting.add_local_ids(due.layer.number)
            words = f"layer {due.layer.number}, call {due.number:,}: {zeros_words(due.call)}"
            self._counting.log(logging.WARNING, words, once=f"{due.layer.number} zeros")
        return "equal"

    def _report(self, due: _Due, call: MoeCall, output: Tensor, returned: Tensor) -> None:
        """Say once for a layer how the output differs from that of the call's kernel, and write the call."""
        with self._lock:
            if due.layer.reported:
                return
            due.layer.reported = True
        experts, generation = call.experts, call.kernel.generation
        expected = forward(call)
        where = differing(output, expected).nonzero()
        tiles = "the forced tiles" if due.forced else "any tiles"
        sentences = [
            f"layer {due.layer.number} differs from the reference ({generation.name} kernel) with {tiles}, first in "
            f"its call {due.number:,}: {len(where):,} of {output.numel():,} elements if the K tiles are "
            f"{call.kernel.tile_k}; {difference_at(output, expected, tuple(where[0].tolist()))}",
            f"M={call.num_tokens} H={experts.hidden_size} I={experts.intermediate_size} E={experts.num_experts} "
            f"k={call.top_k} ep={call.ep_rank}/{call.ep_size} tp={call.tp_rank}/{call.tp_size}",
            *(f"known of this kernel: {fault}" for fault in generation.known_faults),
            self._dumped(due, returned, expected),
        ]
        self._counting.log(logging.WARNING, ". ".join(sentences))

    def _dumped(self, due: _Due, output: Tensor, expected: Tensor) -> str:
        """Write the call if it is to be written; returns what to say of it."""
        if self._dump is None:
            return "Name a folder (MXFP4REF_DUMP) to have the call recorded"
        with self._lock:
            if self._dumps == 0:
                return "Not recorded: as many calls as wanted were"
            self._dumps -= 1
        try:
            return f"Recorded in {write_call(self._dump, due.number, due.given, output, expected)}"
        except Exception as error:  # a full disk, say; the difference has to be told all the same
            return f"Not recorded: {type(error).__name__}: {error}"


def _wrong_kind(call: MoeCall, returned: object) -> str:
    """What the kernel returned instead of an output, or ""."""
    wanted = f"expected the output first, {call.input.dtype} {list(call.input.shape)}"
    if not isinstance(returned, Tensor):
        return f"{wanted}, the kernel returned {type(returned).__name__}"
    if returned.is_meta or (returned.dtype, returned.shape) != (call.input.dtype, call.input.shape):
        kind = "a meta tensor" if returned.is_meta else f"{returned.dtype} {list(returned.shape)}"
        return f"{wanted}, the kernel returned {kind}"
    return ""


def _elsewhere(call: MoeCall, given: object, returned: Tensor) -> str:
    """That the engine's own `output`, in which it looks, has not got what the kernel returned, or ""."""
    if not isinstance(given, Tensor) or given is returned:
        return ""
    alike = (given.dtype, given.shape) == (returned.dtype, returned.shape)
    if alike and not bool(differing(*map(call.written_over, (given, returned))).any()):
        return ""
    return "the kernel returned another tensor than the output that it was given, and that one has other bits"


def _well_defined(call: MoeCall, output: Tensor) -> tuple[MoeCall, Tensor]:
    """Call and output with padding, and zeros, for tokens that name an expert of this rank twice.

    What the kernel adds there was in its workspace before.
    """
    ids = call.token_selected_experts
    first = call.ep_rank * call.experts.num_experts
    ordered = ids.sort(dim=1).values
    owned = (ordered >= first) & (ordered < first + call.experts.num_experts)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & owned[:, 1:]).any(1, keepdim=True)
    if not bool(repeated.any()):
        return call, output
    if bool(repeated.all()):
        raise NotImplementedError("token_selected_experts: every token names an expert of the rank twice")
    ids = torch.where(repeated, PADDING_ID, ids)
    return replace(call, token_selected_experts=ids), torch.where(repeated, 0, output)
