"""One call of the layer: every argument that determines the output, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._shown import Shown
from mxfp4ref._validate import (
    INT32_MAX,
    check_bool,
    check_choice,
    check_instance,
    check_int,
    check_same_device,
    check_tensor,
)
from mxfp4ref.formats.experts import PARAMETERS, Experts
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, Activation, activation_of, check_no_name
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["PADDING_ID", "MoeCall", "check_rows"]

PADDING_ID = -1
_DEFAULT_KERNEL = Sm90Kernel()


def check_rows(activation_type: int, rows: int, inner: int) -> None:
    """Raise ValueError where fc1's rows are those of an activation with a gate, or without, and this is another."""
    activation = ACTIVATIONS[activation_type]
    wanted = 2 * inner if activation.gated else inner
    if rows not in (inner, 2 * inner) or rows == wanted:
        return
    why = "which has a gate" if activation.gated else "which has no gate"
    fitting = [
        f"{other.id} ({other.name})" for other in ACTIVATIONS.values() if other.gated is not activation.gated
    ]
    raise ValueError(
        f"activation_type: expected {wanted} rows of fc1 beside the {inner} columns of fc2 for {activation.name} "
        f"({activation.id}), {why}, got {rows}; write activation_type={', '.join(fitting[:-1])} or {fitting[-1]} "
        "for weights of that shape"
    )


@dataclass(frozen=True, repr=False)
class MoeCall(Shown):
    """The arguments of a forward (`docs/arithmetic.md`, "Tensors and layouts").

    Attributes:
        input: `[M, H] bf16`; with `HummingExperts` fp16 too, which biases and the output then are as well.
        token_selected_experts: `[M, k] int32`, global ids; -1 marks a padded slot.
        token_final_scales: `[M, k] float32`, the routing weights; NaN and Inf are allowed and propagate.
        experts: the experts of this rank (and, under tensor parallelism, its shard of them).
        ep_size, ep_rank: the rank owns the ids `[ep_rank * E, (ep_rank + 1) * E)`; other slots are skipped.
        tp_size, tp_rank: the fc2 bias is added on rank 0 only.
        kernel: which kernel computes it, by default the newest with its default tactics. K tiles order the groups of
            K; N tiles and the generation show only where the first two groups over- or underflow.
        strict: refuse ids that no rank owns and experts that a token names twice. With False the former are
            skipped, as the kernel does, and of the latter only the first slot counts. The kernel leaves the other
            slot's row unset, so what it adds there depends on what its workspace held before.
        activation_type: flashinfer's number of the activation, one of `sm90.activation.ACTIVATIONS`: Swiglu (3) by
            default, Geglu (4), SwigluBias (5), SwigluStep (7), GegluTanh (8), Situ (10); without a gate, for experts
            whose fc1 has I rows, Gelu (0), Relu (1), Silu (2), Relu2 (6), Identity (9).
        unscaled: whether a kernel is given no routing weights (flashinfer's `token_final_scales=None`). The call then
            holds ones, which give the same bits.
        enable_alltoall: whether, on one rank of several (`ep_size`), tokens without an expert of this rank get no
            output; see `written`. The forward leaves zeros in their rows, a kernel whatever was there.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """

    input: Tensor
    token_selected_experts: Tensor
    token_final_scales: Tensor
    experts: Experts
    ep_size: int = 1
    ep_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    kernel: Sm90Kernel = _DEFAULT_KERNEL
    strict: bool = True
    activation_type: int = SWIGLU
    unscaled: bool = False
    enable_alltoall: bool = False

    _PARTS = (Experts,)

    @uncompiled
    def __post_init__(self) -> None:
        check_instance("experts", self.experts, Experts)
        hidden, inner = self.experts.hidden_size, self.experts.intermediate_size
        prepared = isinstance(self.experts, HummingExperts)
        dtypes = (torch.bfloat16, torch.float16) if prepared else (torch.bfloat16,)
        check_tensor("input", self.input, dtype=dtypes, shape=("M", hidden))
        for name in ("fc1_biases", "fc2_biases"):
            if (bias := getattr(self.experts, name)) is not None:
                check_tensor(f"experts.{name}", bias, dtype=self.input.dtype, shape=(None, None))
        sizes = {"M": self.input.shape[0]}
        check_tensor(
            "token_selected_experts",
            self.token_selected_experts,
            dtype=torch.int32,
            shape=("M", "k"),
            sizes=sizes,
            cast=True,
        )
        sizes["k"] = self.token_selected_experts.shape[1]
        check_tensor(
            "token_final_scales",
            self.token_final_scales,
            dtype=torch.float32,
            shape=("M", "k"),
            sizes=sizes,
            cast=True,
        )
        check_same_device(
            {
                "input": self.input,
                "token_selected_experts": self.token_selected_experts,
                "token_final_scales": self.token_final_scales,
                "experts": self.experts.fc1_weights,
            }
        )
        # No more ranks than ids: beyond int32 torch would compare the ids' low bits only.
        for kind, most in (("ep", INT32_MAX // self.experts.num_experts), ("tp", INT32_MAX)):
            size = check_int(f"{kind}_size", getattr(self, f"{kind}_size"), minimum=1, maximum=most)
            check_int(f"{kind}_rank", getattr(self, f"{kind}_rank"), minimum=0, maximum=size - 1)
        check_no_name(self.activation_type)
        check_choice("activation_type", self.activation_type, tuple(ACTIVATIONS))
        check_rows(self.activation_type, self.experts.fc1_weights.shape[1], inner)
        for name in ("unscaled", "enable_alltoall"):
            check_bool(name, getattr(self, name))
        check_instance("kernel", self.kernel, Sm90Kernel)
        if self.experts.quantized:
            for number, depth in enumerate((hidden, inner)):
                tactic = self.kernel.tactics[number]
                if depth % tactic.tile_k:
                    raise ValueError(
                        f"kernel: expected a K tile that divides GEMM{number + 1}'s K = {depth}, got tactic {tactic}"
                    )
        if check_bool("strict", self.strict):
            self._check_ids()

    @property
    def num_tokens(self) -> int:
        return self.input.shape[0]

    @property
    def top_k(self) -> int:
        return self.token_selected_experts.shape[1]

    @property
    def num_global_experts(self) -> int:
        return self.experts.num_experts * self.ep_size

    @property
    def activation(self) -> Activation:
        """What the kernel runs: Swiglu becomes SwigluBias where any of alpha, beta and limit is given."""
        given = [name for name in PARAMETERS if getattr(self.experts, name) is not None]
        return activation_of(self.activation_type, given)

    @property
    def written(self) -> Tensor:
        """Which tokens get an output, `[M] bool`: all; with `enable_alltoall` those with an expert of this rank."""
        if not self._may_leave_rows:
            return torch.ones(self.num_tokens, dtype=torch.bool, device=self.input.device)
        local = self.token_selected_experts.to(torch.int64) - self.ep_rank * self.experts.num_experts
        return ((local >= 0) & (local < self.experts.num_experts)).any(1)

    @property
    def _may_leave_rows(self) -> bool:
        return self.enable_alltoall and self.ep_size > 1

    def written_over(self, output: Tensor, before: Tensor | float = 0.0) -> Tensor:
        """An output, `[M, H]`, with what was there before in the rows that the kernel does not write.

        Args:
            output: of the forward or of a kernel.
            before: `[M, H]` like it, or one number; zeros, as the forward has them, by default.
        """
        if not self._may_leave_rows:
            return output
        return torch.where(self.written[:, None], output, before)

    def select(self, tokens: slice | Tensor) -> MoeCall:
        """The same call for some of its tokens, a slice of them or `[n] int64`, in that order."""
        return replace(
            self,
            input=self.input[tokens],
            token_selected_experts=self.token_selected_experts[tokens],
            token_final_scales=self.token_final_scales[tokens],
        )

    def _check_ids(self) -> None:
        ids = self.token_selected_experts
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "strict: expected False while a CUDA graph is being captured, which cannot wait for the ids to be "
                "looked at; check them before, with strict=True in a call outside of the capture"
            )
        ordered = ids.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ID)
        owned_by_none = (ordered < PADDING_ID) | (ordered >= self.num_global_experts)
        # One look: a GPU has to finish all it has to do before.
        if not bool(owned_by_none.any() | repeated.any()):
            return
        owned_by_none = (ids < PADDING_ID) | (ids >= self.num_global_experts)
        if bool(owned_by_none.any()):
            token, slot = owned_by_none.nonzero()[0].tolist()
            raise ValueError(
                f"token_selected_experts: expected global ids from 0 to {self.num_global_experts - 1}, or -1 for "
                f"padding, got {ids[token, slot].item()} at token {token}, slot {slot} "
                f"({int(owned_by_none.sum())} in all); strict=False skips such slots as the kernel does"
            )
        tokens = repeated.any(1)
        token = int(tokens.nonzero()[0])
        raise ValueError(
            f"token_selected_experts: expected each expert at most once per token, got {ids[token].tolist()} "
            f"at token {token} ({int(tokens.sum())} tokens in all); strict=False counts the first slot only"
        )
