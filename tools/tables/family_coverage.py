"""Whether the goldens catch wrong kernels that are on no list: random members of families of mistakes, per stage.

    python tools/tables/family_coverage.py                  # three members of each family and place
    python tools/tables/family_coverage.py --members 20 --seed 7

A mistake is a place, a change and numbers: scales of fc2 taken from two experts further on, 5 of 8 K groups of the
activation dropped, GEMM1's output cut to bf16. Each member has to be caught by at least two cases, that is, to give
another output than any legitimate one. Numbers are fractions of a call's sizes, so that a member is the same mistake
on every case. Exit code 1 if a member is caught by fewer.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.goldens import Case, open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, Activation, activate
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

ENOUGH = 2
_MANY = 64  # tokens; larger cases are for what shows there only
_GROUP = 32

Change = Callable[[Tensor], Tensor]
Run = Callable[[MoeCall], Tensor]


@dataclass(frozen=True)
class Member:
    """One wrong kernel: its family, what it does, the kernel, and whether it shows on many tokens only."""

    family: str
    words: str
    run: Run
    many: bool = False


def along(t: Tensor, dim: int, index: Tensor) -> Tensor:
    return t.index_select(dim, index.to(t.device))


def index_map(rng: random.Random) -> tuple[str, Callable[[int], Tensor]]:
    """A map of n indices that is not the identity where n is large enough."""
    kind = rng.choice(("shifted", "swapped", "reversed", "modulo", "off by one"))
    part, block = rng.uniform(0.1, 0.9), rng.choice((1, 2, 4, 8))

    def index(n: int) -> Tensor:
        i = torch.arange(n)
        if kind == "shifted":
            return (i + max(1, int(part * n))) % n
        if kind == "swapped":
            return (i ^ block) if n % (2 * block) == 0 else i.flip(0)
        if kind == "modulo":
            return i % max(1, int(part * n))
        return i.flip(0) if kind == "reversed" else (i + 1).clamp(max=n - 1)

    return f"{kind} ({part:.2f}, {block})", index


def tensors(call: MoeCall, names: Iterable[str], change: Change) -> MoeCall:
    """The call with these tensors of its own or its experts' changed, where it has them."""
    own: dict[str, Any] = {}
    of_experts: dict[str, Any] = {}
    for name in names:
        holder, changed = (call, own) if hasattr(call, name) else (call.experts, of_experts)
        if (tensor := getattr(holder, name)) is not None:
            changed[name] = change(tensor)
    return replace(call, experts=replace(call.experts, **of_experts), **own, strict=False)


def after(stage: str, change: Change) -> Run:
    """The kernel with something done to what a stage computes."""
    stages = {
        "fc1_gemm": group_scaled_gemm,
        "activate": activate,
        "fc2_gemm": group_scaled_gemm,
        "finalize": finalize,
    }

    def changed(*arguments: Any, **keywords: Any) -> Tensor:
        return change(stages[stage](*arguments, **keywords))

    return lambda call: forward(call, Stages(**{stage: changed}))


GEMM_TENSORS = ("fc1_weights", "fc1_scales", "fc2_weights", "fc2_scales")
EXPERT_TENSORS = (*GEMM_TENSORS, "fc1_biases", "fc2_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit")
STAGES = ("fc1_gemm", "activate", "fc2_gemm", "finalize")


def index_maps(rng: random.Random) -> Iterator[Member]:
    places = [(name, dim, word) for name in GEMM_TENSORS for dim, word in enumerate(("experts", "rows", "K"))]
    places += [(name, 0, "experts") for name in EXPERT_TENSORS[4:]] + [("fc1_biases", 1, "columns")]
    places += [("input", 0, "tokens"), ("input", 1, "columns"), ("token_final_scales", 0, "tokens")]
    places += [("token_selected_experts", 0, "tokens"), ("token_final_scales", 1, "slots")]
    for name, dim, word in places:
        kind, index = index_map(rng)

        def run(
            call: MoeCall, name: str = name, dim: int = dim, index: Callable[[int], Tensor] = index
        ) -> Tensor:
            return forward(tensors(call, [name], lambda t: along(t, dim, index(t.shape[dim]))))

        yield Member("index map", f"{word} of {name} {kind}", run)
    for stage in STAGES:
        kind, index = index_map(rng)
        yield Member(
            "index map",
            f"columns of {stage} {kind}",
            after(stage, lambda t, i=index: along(t, -1, i(t.shape[-1]))),
        )


def drops(rng: random.Random) -> Iterator[Member]:
    for name in GEMM_TENSORS:
        part, every = rng.uniform(0.05, 0.9), rng.choice((2, 4, 8))

        def tail(t: Tensor, part: float = part) -> Tensor:
            groups = t.shape[-1] * 2 // _GROUP if t.shape[-1] >= 4 * _GROUP // 2 else t.shape[-1]
            width = t.shape[-1] // groups
            t = t.clone()
            t[..., width * min(int(part * groups) + (part < 0.5), groups - 1) :] = 0
            return t

        def rows(t: Tensor, every: int = every) -> Tensor:
            t = t.clone()
            t.view(len(t), -1, 16, t.shape[-1])[:, every - 1 :: every] = 0
            return t

        yield Member(
            "drop", f"K of {name} beyond {part:.2f}", lambda c, n=name, f=tail: forward(tensors(c, [n], f))
        )
        yield Member(
            "drop",
            f"every {every}th 16 rows of {name}",
            lambda c, n=name, f=rows: forward(tensors(c, [n], f)),
        )
    last = rng.choice((0, -1))

    def slot(ids: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, last] = -1
        return ids

    yield Member("drop", f"slot {last}", lambda c: forward(tensors(c, ["token_selected_experts"], slot)))
    beyond = rng.uniform(0.2, 0.9)

    def tokens(call: MoeCall) -> Tensor:
        out = forward(call)
        out[int(beyond * len(out)) :] = 0
        return out

    yield Member("drop", f"tokens beyond {beyond:.2f}", tokens)


def factors(rng: random.Random) -> Iterator[Member]:
    for name in ("fc1_scales", "fc2_scales"):
        power = rng.choice((-3, -2, -1, 1, 2, 3))
        yield Member(
            "factor",
            f"{name} times 2^{power}",
            lambda c, n=name, p=power: forward(
                tensors(c, [n], lambda t: (t.to(torch.int16) + p).clamp(0, 255).to(torch.uint8))
            ),
        )
    for stage in STAGES:
        by = rng.choice((0.5, 2.0, 3.0, 1.5, 0.9, 1 + 2.0**-7))
        yield Member("factor", f"{stage} times {by:g}", after(stage, lambda t, b=by: t * b))
    by = rng.choice((0.5, 2.5, 1.5, 1 + 2.0**-10))
    yield Member(
        "factor",
        f"weights times {by:g}",
        lambda c: forward(tensors(c, ["token_final_scales"], lambda t: t * by)),
    )
    yield Member(
        "factor", "weights squared", lambda c: forward(tensors(c, ["token_final_scales"], torch.square))
    )


def substitutions(rng: random.Random) -> Iterator[Member]:
    for name in EXPERT_TENSORS:
        which, constant = (
            rng.uniform(0, 0.999),
            rng.choice((0.0, 1.0, 7.0)) if name in EXPERT_TENSORS[4:] else rng.choice((0, 120, 127)),
        )
        yield Member(
            "substitution",
            f"{name} is {constant}",
            lambda c, n=name, v=constant: forward(tensors(c, [n], lambda t: torch.full_like(t, v))),
        )
        yield Member(
            "substitution",
            f"{name} of expert {which:.2f} for all",
            lambda c, n=name, w=which: forward(
                tensors(c, [n], lambda t: t[int(w * len(t))].expand_as(t).contiguous())
            ),
        )
    yield Member(
        "substitution",
        "weights are 1",
        lambda c: forward(tensors(c, ["token_final_scales"], torch.ones_like)),
    )
    number = rng.choice(("mean", "first"))
    yield Member(
        "substitution",
        f"weights are the {number} of a token",
        lambda c: forward(
            tensors(
                c,
                ["token_final_scales"],
                lambda t: (t.mean(1, True) if number == "mean" else t[:, :1]).expand_as(t).contiguous(),
            )
        ),
    )


def _cut(x: Tensor, bits: int, nearest: bool) -> Tensor:
    """float32 with fewer bits, cut or rounded half away."""
    raw = x.view(torch.int32)
    step = 1 << (23 - bits)
    kept = (raw + (step // 2 if nearest else 0)) & -step
    return torch.where(x.isfinite(), kept, raw).view(torch.float32)


def roundings(rng: random.Random) -> Iterator[Member]:
    for stage in STAGES:
        kept = rng.choice(((7, False), (6, True), (5, True)))
        yield Member("rounding", f"{stage} to {kept[0]} bits", after(stage, lambda t, k=kept: _cut(t, *k)))
    bits = rng.choice((7, 10, 12, 16))
    yield Member(
        "rounding",
        f"weights to {bits} bits",
        lambda c: forward(tensors(c, ["token_final_scales"], lambda t: _cut(t.contiguous(), bits, True))),
    )
    yield Member(
        "rounding",
        "input to 6 bits",
        lambda c: forward(tensors(c, ["input"], lambda t: _cut(t.to(torch.float32), 6, False).to(t.dtype))),
    )


def orders(rng: random.Random) -> Iterator[Member]:
    for stage in ("fc1_gemm", "fc2_gemm"):
        kind, seed = rng.choice(("descending", "random", "interleaved", "rotated")), rng.randrange(1 << 30)

        def gemm(
            x: Tensor, weights: Tensor, scales: Tensor, kind: str = kind, seed: int = seed, **how: Any
        ) -> Tensor:
            n = scales.shape[-1]
            i = torch.arange(n)
            order = {
                "descending": i.flip(0),
                "random": torch.randperm(n, generator=torch.Generator().manual_seed(seed)),
                "interleaved": torch.cat((i[::2], i[1::2])),
                "rotated": i.roll(n // 2),
            }[kind]
            parts = (t.view(*t.shape[:-1], n, -1)[..., order, :].flatten(-2) for t in (x, weights, scales))
            return group_scaled_gemm(*(p.contiguous() for p in parts), **how)

        yield Member(
            "order", f"groups of {stage} {kind}", lambda c, s=stage, g=gemm: forward(c, Stages(**{s: g}))
        )
    shift = rng.choice((1, -1))

    def slots(call: MoeCall) -> Tensor:
        return forward(
            tensors(call, ["token_selected_experts", "token_final_scales"], lambda t: t.roll(shift, 1))
        )

    yield Member("order", f"slots rotated by {shift}", slots)


def activations(rng: random.Random) -> Iterator[Member]:
    """A formula of clamp, sigmoid and sum of which one part, at least, is not the kernel's."""
    sigmoids: dict[str, Callable[[Tensor], Tensor]] = {
        "exact": torch.sigmoid,
        "hard": torch.nn.functional.hardsigmoid,
        "erf": lambda x: (1 + torch.erf(x / 2**0.5)) / 2,
        "tanh": lambda x: (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: (x > 0).to(x.dtype),
    }
    for _ in range(3):
        choice = {
            "sigmoid": rng.choice(list(sigmoids)),
            "clamp": rng.choice(("right", "gate both", "up only above", "none", "after", "6")),
            "alpha": rng.choice((1.0, 1.702, 0.5)),
            "beta": rng.choice((0.0, 1.0, -1.0)),
            "swapped": rng.random() < 0.2,
        }
        if choice["sigmoid"] == "exact" and choice["clamp"] == "right":
            choice["sigmoid"] = "hard"

        def activation(
            which: Activation, fc1: Tensor, bias: Any, parameters: Any, o: dict[str, Any] = choice
        ) -> Tensor:
            if which.id not in (SWIGLU, SWIGLU_BIAS):
                return activate(which, fc1, bias, parameters)
            limit = parameters[2] if parameters else None
            value = fc1.to(torch.float32)
            value = value if bias is None else value + bias.to(torch.float32)
            up, gate = value.chunk(2, -1)
            up, gate = (gate, up) if o["swapped"] else (up, gate)
            most = torch.full_like(gate[..., :1], 6.0) if o["clamp"] == "6" else limit
            if most is not None and o["clamp"] not in ("none", "after"):
                gate = torch.minimum(gate, most)
                gate = torch.maximum(gate, -most) if o["clamp"] == "gate both" else gate
                up = torch.minimum(up, most)
                up = up if o["clamp"] == "up only above" else torch.maximum(up, -most)
            out = gate * sigmoids[o["sigmoid"]](gate * o["alpha"]) * (up + o["beta"])
            return out if limit is None or o["clamp"] != "after" else torch.minimum(out, limit)

        yield Member("activation", str(choice), lambda c, f=activation: forward(c, Stages(activate=f)))


def stale(rng: random.Random) -> Iterator[Member]:
    for stage in STAGES:
        block, kind = (
            rng.choice((16, 32, 64)),
            rng.choice(("zero", "NaN", "the row before", "what was there")),
        )

        def change(t: Tensor, block: int = block, kind: str = kind) -> Tensor:
            t = t.clone()
            fill = {"zero": 0.0, "NaN": torch.nan, "what was there": 3.0e-3}.get(kind)
            t[..., -block:] = t.roll(1, -2)[..., -block:] if fill is None else fill
            return t

        yield Member("stale memory", f"last {block} columns of {stage}: {kind}", after(stage, change))
    for gemm in ("fc1", "fc2"):
        part, share, by = rng.choice(("K", "rows")), rng.choice((0.25, 0.5, 1.0)), rng.choice((1, -1))

        def tile(
            call: MoeCall, gemm: str = gemm, part: str = part, share: float = share, by: int = by
        ) -> Tensor:
            return forward(stale_tile(call, gemm, part, share, by))

        whose = f"those of the expert {'before' if by > 0 else 'after'}"
        words = f"the last {share:.0%} of {part} of {gemm}'s weights are {whose}"
        yield Member("stale memory", words, tile)


def stale_tile(call: MoeCall, gemm: str, part: str, share: float, by: int) -> MoeCall:
    """With the last share of K, or of rows, of a GEMM's weights and scales from another expert, used or not."""
    changed = {}
    for name in (f"{gemm}_weights", f"{gemm}_scales"):
        tensor = getattr(call.experts, name).clone()
        dim = 2 if part == "K" else 1
        first = tensor.shape[dim] - max(round(share * tensor.shape[dim]), 1)
        other = tensor.roll(by, 0)
        tensor.narrow(dim, first, tensor.shape[dim] - first).copy_(
            other.narrow(dim, first, tensor.shape[dim] - first)
        )
        changed[name] = tensor
    return replace(call, experts=replace(call.experts, **changed))


def ranks(rng: random.Random) -> Iterator[Member]:
    """Slots that belong to no expert of this rank, computed as one of its own."""
    which, weight = rng.uniform(0, 0.999), rng.choice((0.0, None))

    def foreign(call: MoeCall, padded: bool) -> Tensor:
        num, ids, scales = (
            call.experts.num_experts,
            call.token_selected_experts.long(),
            call.token_final_scales,
        )
        first = call.ep_rank * num
        mine = (ids >= first) & (ids < first + num)
        hit = (ids < 0) if padded else (ids >= 0) & ~mine
        local = torch.where(hit, int(which * num), torch.where(mine, ids - first, -1))
        scales = scales if weight is None else scales.masked_fill(hit, weight)
        # A row for each slot alone, so that one expert may be computed for two of them.
        total = torch.zeros_like(call.input, dtype=torch.float32)
        for slot in range(ids.shape[1]):
            one = replace(
                call,
                token_selected_experts=local[:, slot : slot + 1].to(torch.int32),
                token_final_scales=scales[:, slot : slot + 1].contiguous(),
                ep_size=1,
                ep_rank=0,
            )
            total += forward(one).to(torch.float32)
        return total.to(torch.bfloat16)

    words = f"computed as expert {which:.2f} with weight {'0' if weight == 0 else 'as given'}"
    for padded, name in ((True, "padded"), (False, "foreign")):
        right = lambda c, p=padded: bool(_hits(c, p).any())  # noqa: E731

        def run(call: MoeCall, padded: bool = padded, shows: Callable[[MoeCall], bool] = right) -> Tensor:
            return foreign(call, padded) if shows(call) else forward(call)

        yield Member("ranks", f"{name} slots {words}", run)
    shift = rng.choice((1, -1))
    yield Member(
        "ranks",
        f"the rank {shift:+d}",
        lambda c: forward(replace(c, ep_rank=(c.ep_rank + shift) % c.ep_size)),
    )


def _hits(call: MoeCall, padded: bool) -> Tensor:
    ids, num = call.token_selected_experts, call.experts.num_experts
    mine = (ids >= call.ep_rank * num) & (ids < (call.ep_rank + 1) * num)
    return (ids < 0) if padded else (ids >= 0) & ~mine


def thresholds(rng: random.Random) -> Iterator[Member]:
    """Another way that is taken beyond so many tokens, or rows of an expert."""
    tokens, rows = rng.randrange(_MANY, 513), rng.randrange(_MANY, 257)

    def many_tokens(call: MoeCall) -> Tensor:
        out = forward(call)
        return out * 2 if len(out) > tokens else out

    def many_rows(call: MoeCall) -> Tensor:
        out = forward(call)
        ids = call.token_selected_experts
        counts = torch.bincount(ids[ids >= 0].long())
        full = torch.isin(ids, (counts > rows).nonzero().flatten().to(ids.dtype)).any(1)
        return torch.where(full[:, None], -out, out)

    yield Member("threshold", f"more than {tokens} tokens", many_tokens, many=True)
    yield Member("threshold", f"more than {rows} rows of an expert", many_rows, many=True)


FAMILIES = (
    index_maps,
    drops,
    factors,
    substitutions,
    roundings,
    orders,
    activations,
    stale,
    ranks,
    thresholds,
)


def members(seed: int) -> list[Member]:
    """One random member of each family for each place."""
    rng = random.Random(seed)
    return [member for family in FAMILIES for member in family(rng)]


def cases() -> list[Case]:
    goldens = open_goldens()
    loaded = (goldens.load(name) for name in goldens.names() if not name.startswith(("models/", "tile_n/")))
    return [case for case in loaded if case.kind == "moe" and not case.is_whole_layer]


def catching(member: Member, of: Iterable[Case], enough: int = ENOUGH) -> list[str]:
    """The first cases that catch a member, at most `enough`."""
    found: list[str] = []
    for case in of:
        if (len(case.tensors["input"]) > _MANY) == member.many:
            output = member.run(case.call())
            if all(bool(differing(output, right).any()) for right in case.outputs.values()):
                found.append(case.id)
                if len(found) == enough:
                    break
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--members", type=int, default=3, metavar="N", help="of each family and place (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    loaded = cases()
    counts: dict[str, list[int]] = {}
    problems = []
    for seed in range(options.seed, options.seed + options.members):
        for member in members(seed):
            found = catching(member, loaded)
            counts.setdefault(member.family, []).append(len(found))
            if len(found) < ENOUGH:
                problems.append(f"{member.family}: {member.words}: caught by {', '.join(found) or 'no case'}")
    for family, numbers in counts.items():
        print(
            f"{family:14} {len(numbers):4} members, {sum(n >= ENOUGH for n in numbers):4} caught by {ENOUGH} cases"
        )
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
