"""Every option of gpt-oss's activation occurs at every size beyond one tile, in a case of less than whole size."""

from __future__ import annotations

from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall

GOLDENS = open_goldens()
OPTIONS = ("fc1_biases", "fc2_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit")


def sizes_of(call: MoeCall) -> set[str]:
    """In words, what is large about a call: a tile has 128 rows or columns, a warp 32 lanes."""
    experts = call.experts
    _, rows = call.token_selected_experts.clamp(min=0).unique(
        return_counts=True
    )  # not bincount: ids are any int32
    facts = {
        "H > 256": experts.hidden_size > 256,
        "I > 128": experts.intermediate_size > 128,
        "more than 128 rows of an expert": int(rows.max()) > 128,
        "more than 32 experts": experts.num_experts > 32,
        "one slot a token": call.top_k == 1,
        "several slots a token": call.top_k > 1,
        "expert parallelism": call.ep_size > 1,
        "tensor parallelism": call.tp_size > 1,
        "padded": not bool(call.input[:, -1].any()),
    }
    return {words for words, holds in facts.items() if holds}


def test_every_pair_of_an_option_and_a_size_occurs() -> None:
    found: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for name in GOLDENS.names():
        case = GOLDENS.load(name)
        if case.kind != "moe" or case.suite == "models" or case.call().activation.name != "SwigluBias":
            continue
        call = case.call()
        sizes = sizes_of(call)
        seen |= sizes
        found |= {(o, size) for o in OPTIONS if getattr(call.experts, o) is not None for size in sizes}
    assert len(seen) == 9
    assert [
        (option, size) for option in OPTIONS for size in sorted(seen) if (option, size) not in found
    ] == []
