"""One golden case: what it is for, its tensors, and the kernel call that it stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._shown import Shown
from mxfp4ref._words import listed
from mxfp4ref.formats.experts import PARAMETERS, Experts
from mxfp4ref.goldens.error import GoldenError
from mxfp4ref.goldens.generator import generate
from mxfp4ref.goldens.manifest import derived_bytes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = [
    "EXPERT_TENSORS",
    "Case",
    "derive",
    "dtype_name",
    "tensor_bytes",
    "verified_case",
]

_DEFAULT_KERNEL = Sm90Kernel()
# Tensors of `Experts`, in logical layout; the biases and the parameters of the activation are optional.
EXPERT_TENSORS = (
    *("fc1_weights", "fc1_scales", "fc2_weights", "fc2_scales", "fc1_biases", "fc2_biases"),
    *PARAMETERS,
)


@dataclass(frozen=True, eq=False, repr=False)
class Case(Shown):
    """One golden case: why it exists, what goes in, what has to come out.

    Attributes:
        suite, name: its folder and file name.
        kind: what is tested, one of `KINDS`; which tensors a kind has is said in `goldens/README.md`.
        why: the reason for the case, in a sentence or two.
        catches: the defect classes it is there for, names of `mxfp4ref.defects`.
        unique_for: what it is kept for although other cases catch the same defects, or "".
        parameters: integers and strings that are no tensors.
        tensors: all stored tensors by name.
        derived: tensors that are generated instead of stored, and how.
        output_tensors: for kind "moe", the name of the stored output for each pair of K tiles.
        pending: whether no GPU has confirmed the outputs yet.
    """

    suite: str
    name: str
    kind: str
    why: str
    catches: tuple[str, ...]
    unique_for: str
    parameters: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    derived: Mapping[str, Mapping[str, Any]]
    output_tensors: Mapping[tuple[int, int], str]
    pending: bool = False

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"

    @property
    def outputs(self) -> dict[tuple[int, int], Tensor]:
        """For each legitimate pair of K tiles the output `[M, H] bf16`; pairs may share a tensor."""
        return {pair: self.tensors[name] for pair, name in self.output_tensors.items()}

    @property
    def output_hashes(self) -> dict[tuple[int, int], str]:
        """The SHA-256 of each output's bytes."""
        return {pair: hashlib.sha256(tensor_bytes(out)).hexdigest() for pair, out in self.outputs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, of the derived ones with every expert, as a kernel is handed them."""
        stored = sum(tensor.nbytes for tensor in self.tensors.values())
        return int(stored + derived_bytes(self.derived))

    @property
    def is_whole_layer(self) -> bool:
        """Whether its weights, which are derived then, are those of a model's whole layer: 64 MiB or more in all."""
        return bool(self.derived) and self.nbytes >= 64 << 20

    def kernel(self, kernel: Sm90Kernel = _DEFAULT_KERNEL) -> Sm90Kernel:
        """That kernel with the case's own N tile, where the outputs are those of one N tile alone."""
        tile_n = self.parameters.get("tile_n")
        if tile_n is None:
            return kernel
        return Sm90Kernel.of_tiles(kernel.tile_k, (tile_n, tile_n), kernel.generation)

    @cached_property
    def experts(self) -> Experts:
        """This rank's experts, of a case of kind "moe"; derived tensors are generated and verified.

        Of a derived tensor only the experts that the case uses are generated. The others are zeros, which
        take no memory on a CPU until they are touched.
        """
        self._expect_kind("moe")
        given = {name: self.tensors.get(name) for name in EXPERT_TENSORS}
        given |= {name: self._derive(name) for name in self.derived}
        return Experts(**given)  # type: ignore[arg-type]

    def call(self, kernel: Sm90Kernel = _DEFAULT_KERNEL) -> MoeCall:
        """The kernel call of a case of kind "moe", by `self.kernel(kernel)`.

        Raises:
            ValueError: another kind, or a K tile that does not divide a GEMM's K.
            GoldenError: a derived tensor does not have the recorded hash.
        """
        self._expect_kind("moe")
        return MoeCall(
            input=self.tensors["input"],
            token_selected_experts=self.tensors["token_selected_experts"],
            token_final_scales=self.tensors["token_final_scales"],
            experts=self.experts,
            kernel=self.kernel(kernel),
            ep_size=self.parameters["ep_size"],
            ep_rank=self.parameters["ep_rank"],
            tp_size=self.parameters["tp_size"],
            tp_rank=self.parameters["tp_rank"],
            strict=self.parameters["strict"],
            activation_type=self.parameters.get("activation_type", SWIGLU),
            unscaled=self.parameters.get("unscaled", False),
            enable_alltoall=self.parameters.get("enable_alltoall", False),
        )

    def _expect_kind(self, kind: str) -> None:
        if self.kind != kind:
            raise ValueError(f"{self.id}: expected a case of kind {kind!r}, got kind {self.kind!r}")

    def _derive(self, name: str) -> Tensor:
        try:
            tensor, digest = derive(name, self.derived[name])
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise GoldenError(
                f"{self.id}: derived tensor {name}: expected a recipe that can be followed, got "
                f"{type(error).__name__}: {error}"
            ) from error
        if digest != self.derived[name]["sha256"]:
            raise GoldenError(
                f"{self.id}: derived tensor {name}: expected SHA-256 {self.derived[name]['sha256']}, "
                f"the generator gave {digest}"
            )
        return tensor


def derive(name: str, recipe: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Generate a tensor by its recipe; return it and the SHA-256 of the generated experts, one after another.

    The stream of `name` holds experts of the shape `content` = [blocks, rows, ...], this rank's from
    `first_expert` on. Each block goes to the upper left of its equal share of the rows of `shape`; what is left
    of those, and every expert that is not in `experts`, is zero.
    """
    num_experts, *shape = recipe["shape"]
    blocks, *content = recipe["content"]
    limits = {limit: recipe[limit] for limit in ("low", "high") if limit in recipe}
    is_bf16 = recipe["rule"] == "bf16"
    # numpy's zeros take no memory until they are touched; it has no bf16.
    out = torch.from_numpy(np.zeros((num_experts, *shape), dtype=np.int16 if is_bf16 else np.uint8))
    out = out.view(torch.bfloat16) if is_bf16 else out
    size = blocks * int(np.prod(content))
    digest = hashlib.sha256()
    for expert in recipe["experts"]:
        start = (recipe["first_expert"] + expert) * size
        values = generate(recipe["seed"], name, (blocks, *content), recipe["rule"], start=start, **limits)
        target = out[expert].view(blocks, shape[0] // blocks, *shape[1:])
        target[(slice(None), *(slice(length) for length in content))] = values
        digest.update(tensor_bytes(out[expert]))
    return out, digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor in C order, little-endian."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def verified_case(name: str, sidecar: dict[str, Any], tensors: dict[str, Tensor]) -> Case:
    """The verified case of a sidecar and its tensors."""
    if f"{sidecar['suite']}/{sidecar['name']}" != name:
        raise GoldenError(f"{name}: the file says that it is {sidecar['suite']}/{sidecar['name']}: renamed?")
    if set(tensors) != set(sidecar["tensors"]):
        wanted, there = (listed(sorted(names)) for names in (sidecar["tensors"], tensors))
        raise GoldenError(f"{name}: expected the tensors {wanted}, got {there}")
    for key, recorded in sidecar["tensors"].items():
        tensor = tensors[key]
        got = {"dtype": dtype_name(tensor), "shape": list(tensor.shape)}
        if got != {"dtype": recorded["dtype"], "shape": recorded["shape"]}:
            raise GoldenError(
                f"{name}: tensor {key}: expected {recorded['dtype']} {recorded['shape']}, "
                f"got {got['dtype']} {got['shape']}"
            )
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if digest != recorded["sha256"]:
            raise GoldenError(f"{name}: tensor {key}: expected SHA-256 {recorded['sha256']}, got {digest}")
    output_tensors = {
        (first, second): output["tensor"]
        for output in sidecar["outputs"]
        for first, second in output["tile_k"]
    }
    unknown = sorted(set(output_tensors.values()) - set(tensors))
    if unknown or bool(output_tensors) != (sidecar["kind"] == "moe"):
        raise GoldenError(
            f"{name}: expected outputs of kind 'moe' that are stored, got {unknown or output_tensors} "
            f"for kind {sidecar['kind']!r}"
        )
    return Case(
        suite=sidecar["suite"],
        name=sidecar["name"],
        kind=sidecar["kind"],
        why=sidecar["why"],
        catches=tuple(sidecar["catches"]),
        unique_for=sidecar["unique_for"],
        parameters=sidecar["parameters"],
        tensors=tensors,
        derived=sidecar["derived"],
        output_tensors=output_tensors,
        pending=sidecar.get("pending", False),
    )
