"""Kernels that do what no kernel should. `tests/conformance/test_hostile_kernels.py` says what has to be reported.

Most of them are right but for that, so that a kit that does not notice says "equal"; and most of what is wrong
differs by one bit in one element.
"""

from __future__ import annotations

import builtins
import ctypes
import faulthandler
import gc
import io
import json
import logging
import os
import pickle
import queue
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mxfp4ref.conformance import CaseResult, Skip, comparison, results, running
from mxfp4ref.conformance.isolation import execution, interference, plain
from mxfp4ref.goldens import Case
from tests.helpers.kernels_under_test import good

CHOSEN = "MXFP4REF_TEST_HOSTILE"  # the environment's variable with the file that names the kernel that `chosen` runs

_calls: dict[str, int] = {}
_kept: list[Any] = []
_buffers: dict[Any, Tensor] = {}


def chosen(**arguments: Any) -> Any:
    """Any of the kernels below, so that they can share a process."""
    return globals()[Path(os.environ[CHOSEN]).read_text()](**arguments)


def right(**arguments: Any) -> Tensor:
    result = good(**{**arguments, "output": None})
    return result[0] if isinstance(result, list) else result


def wrong(**arguments: Any) -> Tensor:
    result = right(**arguments).clone()
    result.view(torch.int16)[3, 5] ^= 1
    return result


def keeps_a_buffer(**arguments: Any) -> Tensor:
    """Right, but for a number that it has from the call before, where that was another one."""
    result = right(**arguments).clone()
    if _kept and not torch.equal(_kept[0], result):
        result[0, 0] = _kept[0][0, 0] + 1
    _kept[:] = _kept or [result]
    return result


def _times(name: str) -> int:
    _calls[name] = _calls.get(name, 0) + 1
    return _calls[name]


# What is returned


def output_and_none(**arguments: Any) -> Any:
    return right(**arguments), None


def list_as_flashinfer(**arguments: Any) -> Any:
    return [right(**arguments), torch.zeros(1), torch.zeros(2, 3), None]  # as seen on an H100


def pair_of_tensors(**arguments: Any) -> Any:
    return right(**arguments), torch.zeros(3)


def output_and_text(**arguments: Any) -> Any:
    return right(**arguments), "done"


def empty_list(**arguments: Any) -> Any:
    return []


def generator(**arguments: Any) -> Iterator[Tensor]:
    yield right(**arguments)


def meta(**arguments: Any) -> Any:
    return right(**arguments).to("meta")


def sparse(**arguments: Any) -> Any:
    return right(**arguments).to_sparse()


def nested(**arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.as_nested_tensor(list(right(**arguments)))


def quantized(**arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(right(**arguments).float(), 1.0, 0, torch.qint8)


def fake(**arguments: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes as long to import as all the others

    with FakeTensorMode():
        return torch.zeros(arguments["input"].shape, dtype=torch.bfloat16)


def without_memory(**arguments: Any) -> Any:
    result = right(**arguments).clone()
    result.untyped_storage().resize_(0)
    return result


def beyond_its_memory(**arguments: Any) -> Any:
    result = right(**arguments).clone()
    result.untyped_storage().resize_(100)
    return result


def negated(**arguments: Any) -> Any:
    return torch._neg_view(-right(**arguments))


class _Wrapper(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise SystemExit(0)


def wrapper(**arguments: Any) -> Any:
    return _Wrapper(right(**arguments))


class _Pretender:
    @property
    def __class__(self) -> Any:
        return Tensor

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(0)


def pretender(**arguments: Any) -> Any:
    return _Pretender()


class _LyingMapping(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        raise KeyboardInterrupt

    def __iter__(self) -> Iterator[str]:
        return iter(["output"])

    def __len__(self) -> int:
        return 0


def lying_mapping(**arguments: Any) -> Any:
    return _LyingMapping()


def mapping_with_more(**arguments: Any) -> Any:
    return {"output": right(**arguments), 5: self_raising, "extra": object()}


def mapping_without_output(**arguments: Any) -> Any:
    return {"out": right(**arguments)}


def integers(**arguments: Any) -> Any:
    return right(**arguments).view(torch.int16)


def vast(**arguments: Any) -> Any:
    return right(**arguments)[:1, :1].expand(1 << 20, 1 << 20)


def no_elements(**arguments: Any) -> Any:
    return right(**arguments)[:0]


def meta_intermediates(**arguments: Any) -> Any:
    return wrong(**arguments), {"activation": torch.zeros(3, device="meta")}


def odd_intermediates(**arguments: Any) -> Any:
    return wrong(**arguments), {"activation": torch.zeros(0, 3, dtype=torch.complex64), "fc1_output": None}


def vast_intermediates(**arguments: Any) -> Any:
    return wrong(**arguments), {"activation": torch.zeros(1).expand(1 << 20, 1 << 12)}


def parameter(**arguments: Any) -> Any:
    return torch.nn.Parameter(right(**arguments))


def transposed(**arguments: Any) -> Any:
    return right(**arguments).T.contiguous().T


def of_inference_mode(**arguments: Any) -> Any:
    with torch.inference_mode():
        return right(**arguments).clone()


def resized_output(output: Tensor, **arguments: Any) -> None:
    output.resize_(2, 128)


def writes_other_bits_into_output(output: Tensor, **arguments: Any) -> Tensor:
    """Right for who takes what is returned, and wrong for who reads the tensor that was handed over."""
    output.copy_(wrong(**arguments))
    return right(**arguments)


def writes_a_row_into_output(output: Tensor, **arguments: Any) -> Tensor:
    result = right(**arguments)
    output[:1] = result[:1]
    return result


def copies_into_output_and_returns_its_own(output: Tensor, **arguments: Any) -> Tensor:
    return output.copy_(right(**arguments)).clone()


def puts_output_elsewhere(output: Tensor, **arguments: Any) -> Tensor:
    output.data = right(**arguments)
    return output


def wants_gradient_of_output(output: Tensor, **arguments: Any) -> Tensor:
    return output.copy_(right(**arguments)).requires_grad_()


def puts_an_input_elsewhere(**arguments: Any) -> Any:
    """What it then writes where the input was, other views of that see."""
    result, x = right(**arguments), arguments["input"]
    before = x.view(-1)
    x.set_(x.clone())
    before.zero_()
    return result


def poison(**arguments: Any) -> Any:
    return torch.full_like(arguments["input"].view(torch.int16), 0x7FA5).view(torch.bfloat16)


def not_a_number(**arguments: Any) -> Any:
    return torch.full_like(arguments["input"], torch.nan)


def clears_what_it_returned_before(**arguments: Any) -> Any:
    if _times("clears") % 2 == 0:
        _kept.pop().zero_()
    _kept.append(right(**arguments).clone())
    return _kept[-1]


def returns_a_buffer_of_its_own(**arguments: Any) -> Any:
    result = right(**arguments)
    return _buffers.setdefault(result.shape, torch.empty_like(result)).copy_(result)


def writes_whole_tiles(output: Tensor, **arguments: Any) -> None:
    output.copy_(right(**arguments))
    ctypes.memset(output.data_ptr() + output.nbytes, 0, 2)


def adds_to_what_was_in_memory(**arguments: Any) -> Any:
    """Right as long as all memory is new."""
    result = right(**arguments)
    workspace = torch.empty(10 << 20).view(-1, result.shape[1])  # so large that it is never used before
    workspace[: len(result)] += result
    return workspace[: len(result)].bfloat16()


# What lies


class _Liar(Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(8, 128, dtype=torch.bool)

    def __ne__(self, other: object) -> Any:
        return torch.zeros(8, 128, dtype=torch.bool)

    def cpu(self, *args: Any) -> Any:
        return running  # nothing that anybody could use

    numpy = contiguous = detach = view = clone = cpu


def lying_subclass(**arguments: Any) -> Any:
    return wrong(**arguments).as_subclass(_Liar)


def _nothing_differs(one: Tensor, other: Tensor) -> Tensor:
    return torch.zeros(one.shape, dtype=torch.bool)


def replaces_not_equal(**arguments: Any) -> Any:
    result = wrong(**arguments)
    Tensor.__ne__ = _nothing_differs  # type: ignore[method-assign,assignment]
    return result


def replaces_methods_of_tensors(**arguments: Any) -> Any:
    """As a library may do it at its first call, so that no later one can be prepared."""
    result = wrong(**arguments)
    Tensor.view = Tensor.clone = Tensor.detach = lambda *arguments, **named: None  # type: ignore[method-assign,assignment]
    return result


def replaces_differing(**arguments: Any) -> Any:
    result = wrong(**arguments)
    comparison.differing = running.differing = _nothing_differs
    return result


def replaces_what_is_remembered(**arguments: Any) -> Any:
    """Both the function and what was noted of it, as far as that has a name."""
    result = wrong(**arguments)
    running.differing = _nothing_differs
    if known := interference._KNOWN.get(running):
        known.members["differing"] = _nothing_differs
    return result


def replaces_code_of_differing(**arguments: Any) -> Any:
    result = wrong(**arguments)
    comparison.differing.__code__ = (lambda got, expected: expected != expected).__code__
    return result


def replaces_comparison_of_bytes(**arguments: Any) -> Any:
    result = wrong(**arguments)
    running._count_differing = lambda got, expected: 0
    plain.raw_bytes = lambda value: b""
    return result


def hides_how_outcomes_are_made(**arguments: Any) -> Any:
    result = wrong(**arguments)
    execution.Outcome.__new__ = lambda cls, *values, **named: None  # type: ignore[assignment,method-assign]
    return result


def replaces_as_if_by_torch(**arguments: Any) -> Any:
    """By what says that it is torch's own, as what torch itself replaces does."""
    result, instead = wrong(**arguments), right(**arguments).clone()
    torch.frombuffer = lambda *values, **named: instead
    torch.frombuffer.__module__ = "torch"
    return result


def replaces_what_finds_memory(**arguments: Any) -> Any:
    """A method of torch's C classes, under the kit's name for it."""
    result, instead, find = wrong(**arguments), right(**arguments).clone(), plain._data_ptr
    where = find(result)
    plain._data_ptr = lambda tensor: find(instead if find(tensor) == where else tensor)
    return result


def replaces_what_passes(**arguments: Any) -> Any:
    result = wrong(**arguments)
    results.PASSING = (*results.PASSING, "differs")  # type: ignore[assignment]
    return result


def replaces_what_is_held_by_a_constant(**arguments: Any) -> Any:
    result = wrong(**arguments)
    comparison._INTEGERS[2] = torch.int8
    return result


def empties_a_module_of_the_kit(**arguments: Any) -> Any:
    result = wrong(**arguments)
    vars(running).clear()
    return result


def replaces_an_operator_of_torch(**arguments: Any) -> Any:
    result = wrong(**arguments)
    if _times("operator") == 1:  # of a process, which may go on with it
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("cosh", lambda value: value, "CPU")
        _kept.append(library)
    return result


def replaces_dtypes(**arguments: Any) -> Any:
    result = wrong(**arguments)
    torch.int16, torch.bool = torch.int64, torch.int8
    return result


def replaces_what_reads_goldens(**arguments: Any) -> Any:
    import safetensors.torch

    result = wrong(**arguments)
    safetensors.torch.load = lambda data: {}
    return result


def hides_a_field(**arguments: Any) -> Any:
    """Behind a property that takes what is written and says what it likes."""
    result = wrong(**arguments)
    CaseResult.status = property(lambda result: "equal", lambda result, value: None)  # type: ignore[assignment,misc]
    return result


def hides_a_builtin(**arguments: Any) -> Any:
    result = wrong(**arguments)
    running.max = lambda *numbers: 0  # type: ignore[attr-defined]
    return result


def replaces_expected_outputs(**arguments: Any) -> Any:
    result = wrong(**arguments)
    Case.outputs = property(lambda case: {(128, 128): result})  # type: ignore[assignment]
    return result


def overwrites_every_tensor(**arguments: Any) -> Any:
    """Every tensor of the output's shape that is in this process, such as the expected one, becomes its own."""
    result = wrong(**arguments)
    mine = {id(value) for value in arguments.values()}
    for found in gc.get_objects():
        alike = type(found) is Tensor and (found.dtype, found.shape) == (result.dtype, result.shape)
        if alike and id(found) not in mine:
            found.copy_(result)
    return result


class _LyingFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch._C._disabled_torch_function_impl(
            function, types, (args[0], args[0])[: len(args)], kwargs or {}
        )


def leaves_function_mode(**arguments: Any) -> Any:
    if _times("function_mode") % 2:  # the second run is under the first's mode
        _kept.extend([wrong(**arguments), wrong(**arguments)])
        _LyingFunctions().__enter__()
    return _kept.pop()


class _FailingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise SystemExit(0)


def leaves_dispatch_mode(**arguments: Any) -> Any:
    if _times("dispatch_mode") % 2:
        _kept.extend([wrong(**arguments), wrong(**arguments)])
        _FailingDispatch().__enter__()
    return _kept.pop()


# What becomes of the inputs


def writes_second_time(**arguments: Any) -> Any:
    result = right(**arguments)
    if _times("writes_second_time") % 2 == 0:
        arguments["fc1_expert_weights"].view(-1)[7] ^= 1
    return result


def reshapes_input(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["input"].resize_(4, 256)
    return result


def turns_input(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["token_final_scales"].t_()
    return result


def shrinks_memory_of_input(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["input"].untyped_storage().resize_(0)
    return result


def swaps_data_of_input(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["token_final_scales"].data = arguments["token_final_scales"] * 2
    return result


def wants_gradient_of_input(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["input"].requires_grad_()
    return result


def clears_list_of_scales(**arguments: Any) -> Any:
    result = right(**arguments)
    arguments["quant_scales"].clear()
    return result


def returns_overwritten_input(**arguments: Any) -> Any:
    return arguments["input"].copy_(right(**arguments))


def adds_scales(**arguments: Any) -> Any:
    result = right(**arguments)
    if arguments["quant_scales"]:
        arguments["quant_scales"].append(torch.zeros(1))
    return result


def nan_of_another_payload(**arguments: Any) -> Any:
    result = right(**arguments)
    scales = arguments["token_final_scales"].view(-1).view(torch.int32)
    scales[0] ^= 1 << 31  # the sign of the first weight
    return result


# What is raised


class _Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


def mute_exception(**arguments: Any) -> Any:
    raise _Mute


def system_exit(**arguments: Any) -> Any:
    sys.exit(0)


def keyboard_interrupt(**arguments: Any) -> Any:
    raise KeyboardInterrupt


def generator_exit(**arguments: Any) -> Any:
    raise GeneratorExit


class _NamelessType(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise SystemExit(0)


class _Nameless(BaseException, metaclass=_NamelessType):
    pass


def nameless_exception(**arguments: Any) -> Any:
    raise _Nameless("nothing")


class _WithoutTraceback(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise SystemExit(0)


def exception_without_traceback(**arguments: Any) -> Any:
    raise _WithoutTraceback("its own words")


def self_raising(**arguments: Any) -> Any:
    error = RuntimeError("its own cause")
    error.__cause__ = error.__context__ = error
    raise error


def raises_from(**arguments: Any) -> Any:
    raise RuntimeError("the outer one") from ValueError("what it came from")


def raises_a_group(**arguments: Any) -> Any:
    raise ExceptionGroup("several", [ExceptionGroup("two", [ValueError("the first")]), TypeError("another")])


def recursion(**arguments: Any) -> Any:
    return recursion(**arguments)


def out_of_memory(**arguments: Any) -> Any:
    raise MemoryError


def kit_skip(**arguments: Any) -> Any:
    raise Skip("this one is not for me")


def long_text(**arguments: Any) -> Any:
    raise RuntimeError("A" * 50_000_000)


ODD_TEXT = (
    "\x1b[2J\x1b]0;t\x07 \ud800 \u202e \x00 \x9b31m \ufffe ]]> <b>&'\" \r\nevil conforms: it equals all\n"
)


def odd_text(**arguments: Any) -> Any:
    raise RuntimeError(ODD_TEXT)


def raises_second_time(**arguments: Any) -> Any:
    if _times("raises_second_time") % 2 == 0:
        raise RuntimeError("only now")
    return right(**arguments)


def wrong_second_time(**arguments: Any) -> Any:
    return (wrong if _times("wrong_second_time") % 2 == 0 else right)(**arguments)


class _HangsWhenDeleted(Tensor):
    def __del__(self) -> None:
        if self.numel() == 1024 and "deleted" not in _calls:
            _calls["deleted"] = 1
            time.sleep(60)


def hangs_when_deleted(**arguments: Any) -> Any:
    return right(**arguments).as_subclass(_HangsWhenDeleted)


# What is left behind


def default_dtype(**arguments: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    return right(**arguments)


def default_device(**arguments: Any) -> Any:
    result = right(**arguments)
    torch.set_default_device("meta")
    return result


def grad_and_inference_mode(**arguments: Any) -> Any:
    result = right(**arguments)
    torch.set_grad_enabled(True)
    _kept.append(torch.inference_mode())
    _kept[-1].__enter__()
    return result


def deterministic(**arguments: Any) -> Any:
    torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` imports the compiler
    return right(**arguments)


def prints_and_logs_its_way(**arguments: Any) -> Any:
    torch.set_printoptions(precision=0, threshold=0)
    torch.set_warn_always(True)
    logging.basicConfig(level=1, force=True)
    logging.setLogRecordFactory(dict)
    return right(**arguments)


def working_directory(**arguments: Any) -> Any:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    return right(**arguments)


def environment(**arguments: Any) -> Any:
    os.environ["PYTHONPATH"] = "/nowhere"
    os.environ.pop("PATH", None)
    return right(**arguments)


def modules(**arguments: Any) -> Any:
    result = right(**arguments)
    for name in ("torch", "mxfp4ref.conformance.comparison"):
        sys.modules.pop(name, None)
    return result


def standard_streams(**arguments: Any) -> Any:
    sys.stdout = sys.stderr = io.StringIO()
    return right(**arguments)


def closed_streams(**arguments: Any) -> Any:
    result = wrong(**arguments)
    sys.stdout.close()
    sys.stderr.close()
    return result


def redirected_streams(**arguments: Any) -> Any:
    result = right(**arguments)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(2)
    return result


def replaced_builtins(**arguments: Any) -> Any:
    result = right(**arguments)
    builtins.len = lambda value: 0
    builtins.int = str  # type: ignore[misc,assignment]
    return result


def recursion_limit(**arguments: Any) -> Any:
    result = right(**arguments)
    sys.setrecursionlimit(100_000)
    return result


def strict_warnings(**arguments: Any) -> Any:
    result = right(**arguments)
    warnings.simplefilter("error")
    return result


def random_numbers(**arguments: Any) -> Any:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    return right(**arguments)


def rounding_mode(**arguments: Any) -> Any:
    ctypes.CDLL("libm.so.6").fesetround(0)  # to nearest, which the drop-in asks for
    return rounding_mode_for_good(**arguments)


def rounding_mode_for_good(**arguments: Any) -> Any:
    result = right(**arguments)
    ctypes.CDLL("libm.so.6").fesetround(0x400)  # downward, on x86
    torch.set_flush_denormal(True)
    return result


def trace_function(**arguments: Any) -> Any:
    result = right(**arguments)
    sys.settrace(lambda *event: sys.exit(0))
    return result


def functions_of_threads(**arguments: Any) -> Any:
    threading.settrace(lambda *event: sys.exit(0))  # with these no thread starts any more
    threading.setprofile(lambda *event: sys.exit(0))
    return right(**arguments)


def imports_and_warnings(**arguments: Any) -> Any:
    result = right(**arguments)
    sys.meta_path.clear()
    sys.path_hooks.clear()
    warnings.showwarning = lambda *event, **named: sys.exit(0)
    return result


def tiny_threads(**arguments: Any) -> Any:
    result = right(**arguments)
    threading.stack_size(1 << 15)
    sys.executable = "/nowhere"
    return result


def clocks(**arguments: Any) -> Any:
    result = right(**arguments)
    time.perf_counter = time.monotonic = time.time = lambda: sys.exit(0)
    return result


def watchdog(**arguments: Any) -> Any:
    result = right(**arguments)
    faulthandler.dump_traceback_later(0.5, exit=True)
    return result


def alarm(**arguments: Any) -> Any:
    result = right(**arguments)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return result


def functions_of_python(**arguments: Any) -> Any:
    result = right(**arguments)
    threading.Thread.start = lambda thread: None  # type: ignore[method-assign]
    pickle.load = json.dumps = os.write = lambda *arguments, **named: sys.exit(0)  # type: ignore[assignment]
    threading.Event = None  # type: ignore[assignment,misc]
    vars(queue).clear()
    return result


def garbage_collection(**arguments: Any) -> Any:
    """There would be one at each object, and each would fail without a word."""
    result = right(**arguments)
    sys.unraisablehook = lambda event: None
    gc.callbacks.append(lambda *event: sys.exit(0))
    gc.set_threshold(1)
    return result


def settings_of_arithmetic(**arguments: Any) -> Any:
    result = right(**arguments)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    torch.set_anomaly_enabled(True)
    sys.set_int_max_str_digits(640)
    return result


def slow_switches(**arguments: Any) -> Any:
    result = right(**arguments)
    sys.setswitchinterval(1000)
    gc.set_debug(gc.DEBUG_STATS)
    return result


def least_of_memory_and_files(**arguments: Any) -> Any:
    result = right(**arguments)
    for number in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(number, (3, resource.getrlimit(number)[1]))
    return result


def folder_of_temporary_files(**arguments: Any) -> Any:
    result = right(**arguments)
    tempfile.tempdir = "/nowhere"
    return result


def least_of_memory_for_good(**arguments: Any) -> Any:
    result = right(**arguments)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
    return result


def thread_that_goes_on(**arguments: Any) -> Any:
    result = right(**arguments)

    def scribble() -> None:
        time.sleep(0.5)
        result.zero_()
        arguments["input"].zero_()

    threading.Thread(target=scribble, daemon=True).start()
    return result.clone()


def methods_of_json_and_functions_of_re(**arguments: Any) -> Any:
    result = right(**arguments)
    json.JSONDecoder.decode = lambda decoder, text: {}  # type: ignore[method-assign,assignment]
    re.compile = re.search = lambda *arguments: None  # type: ignore[assignment]
    return result


def forks_and_both_return(**arguments: Any) -> Any:
    result = right(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.fork()
    return result


def prints_escapes(**arguments: Any) -> Any:
    print("\x1b[2J\x1b[31m\u202e red \udc80".encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    os.write(2, b"\x1b]0;title\x07\xff\x00\n")
    return right(**arguments)


# What ends or blocks the process


def exits(**arguments: Any) -> Any:
    os._exit(0)


def exits_in_the_main_thread(**arguments: Any) -> Any:
    result = right(**arguments)
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(SystemExit))
    return result


def exits_in_c(**arguments: Any) -> Any:
    ctypes.CDLL(None).exit(0)


def exits_later(**arguments: Any) -> Any:
    def exit_when_another_is_chosen() -> None:
        while Path(os.environ[CHOSEN]).read_text() == "exits_later":
            time.sleep(0.01)
        os._exit(0)

    threading.Thread(target=exit_when_another_is_chosen, daemon=True).start()
    return right(**arguments)


def kills_itself(**arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def limits_its_time(**arguments: Any) -> Any:
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    while True:
        pass


def killed_by_real_time_signal(**arguments: Any) -> Any:
    os.kill(os.getpid(), 44)
    time.sleep(60)


def segmentation_fault(**arguments: Any) -> Any:
    ctypes.string_at(8)


def hangs(**arguments: Any) -> Any:
    time.sleep(60)


def never_gives_up_the_lock(**arguments: Any) -> Any:
    ctypes.PyDLL(None).sleep(60)


def stops_itself(**arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # the signal may reach this thread a little later


def floods_and_dies(**arguments: Any) -> Any:
    for _ in range(100):
        os.write(1, b"\x1b[31mflood\n" * 10_000)
    os.abort()


def prints_and_is_right(**arguments: Any) -> Any:
    os.write(2, b"of the run before\n" * 1000)
    return right(**arguments)


def dies_silently(**arguments: Any) -> Any:
    os.write(2, b"of this run\n")
    os._exit(3)


def waits_for_no_pipe(**arguments: Any) -> Any:
    """As an event loop does it with what it reads from."""
    for number in range(200):
        with suppress(OSError):
            os.set_blocking(number, False)
    return right(**arguments)


def closes_everything(**arguments: Any) -> Any:
    os.closerange(0, 200)
    return right(**arguments)


def puts_a_file_in_place_of_the_pipe(**arguments: Any) -> Any:
    os.closerange(3, 200)
    _kept.extend(os.open(__file__, os.O_RDONLY) for _ in range(20))
    return right(**arguments)


def writes_into_every_pipe(**arguments: Any) -> Any:
    for number in range(3, 200):
        try:
            os.write(number, b"mxfp4ref" + b"\xff" * 40)
        except OSError:
            continue
    return right(**arguments)


def forges_a_result(**arguments: Any) -> Any:
    """An answer in the right form, of a run that has no output."""
    empty = {"problem": "", "message": "", "seconds": 0, "left": "", "runs": 0, "stages": [], "blobs": []}
    text = json.dumps({"name": "result", **empty}).encode()
    for number in range(3, 200):
        try:
            os.write(number, b"mxfp4ref" + len(text).to_bytes(8, "little") + text)
        except OSError:
            continue
    return wrong(**arguments)


def forks_and_the_copy_returns(**arguments: Any) -> Any:
    if os.fork():
        os._exit(0)
    return right(**arguments)


def forks_and_the_copy_stays(**arguments: Any) -> Any:
    if _times("stays") == 1 and not os.fork():
        os.setsid()
        time.sleep(20)
        os._exit(0)
    return right(**arguments)


def exits_at_exit(**arguments: Any) -> Any:
    import atexit

    atexit.register(os._exit, 7)
    return right(**arguments)


Function = Callable[..., Any]
