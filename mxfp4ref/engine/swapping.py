"""Swap: the oracle answers in the kernel's place."""

from __future__ import annotations

import logging
from typing import Any, Literal

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_bool
from mxfp4ref.engine.arguments import bind, capturing, layout_of_release, loaded_release
from mxfp4ref.engine.counting import Counting
from mxfp4ref.engine.install import Kernel
from mxfp4ref.model.flashinfer import drop_in, torch_ref_cutlass_fused_moe

__all__ = ["Swap"]


class Swap:
    """Answers calls; see `mxfp4ref.engine.swap`."""

    def __init__(
        self, counting: Counting, *, fall_through: bool = True, strict: bool | Literal["count"] = "count"
    ) -> None:
        check_bool("fall_through", fall_through)
        drop_in(strict=strict)  # refuses what is no such option
        self._counting, self._fall_through, self._strict = counting, fall_through, strict

    @uncompiled
    def __call__(self, kernel: Kernel, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            given = bind(arguments, named)
            layout = layout_of_release(loaded_release(), given)
            answer = torch_ref_cutlass_fused_moe(**given, weight_layout=layout, strict=self._strict)
        except NotImplementedError as error:
            if not self._fall_through:
                raise
            self._counting.log(logging.WARNING, f"left to the real kernel: {error}", once=str(error))
            answer = kernel(*arguments, **named)
            self._counting.add("not_modelled")
            return answer
        except RuntimeError as error:
            if capturing(arguments, named):
                raise RuntimeError(
                    f"{error} (mxfp4ref is swapped in while a CUDA graph is captured; if the oracle cannot be "
                    "captured here, switch graphs off: --enforce-eager for vLLM, --disable-cuda-graph for sglang)"
                ) from error
            raise
        self._counting.add("answered")
        return answer
