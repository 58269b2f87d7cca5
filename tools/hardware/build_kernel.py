"""Build flashinfer's SM90 fused-MoE module with only its MXFP4 paths, on a machine without a GPU.

The stock module is some 190 CUDA files; a path that this package models needs about 20 of them. The tool
makes a private copy of an installed or unpacked flashinfer-python, takes the other types out of it, lets
flashinfer write its own ninja build, runs that, and packs the module together with flashinfer's Python code
into one archive. On the GPU machine, with torch and numpy and no network:

    sys.path.insert(0, "the unpacked archive"); import flashinfer.fused_moe

loads the module in place of compiling one; so does an installed flashinfer of the same release, if the archive's
flashinfer/data/aot is copied into it. On 16 cores a build took 2.5 minutes (0.6.15.post1) and 4 (0.7.2.post1), one
of all clusters 7.5. An interrupted build goes on where it stopped when the same command is given again. See
`docs/arithmetic.md`, section 8.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODULE = "fused_moe_90"
OLDEST_CUDA = (12, 8)  # the first with cuda_fp4.h
ARCHIVE_LIMIT = 20_000_000  # bytes
ONE_CTA = (1, 1, 1)
MXFP4_TYPES = ("SafeFP4", "__nv_fp4_e2m1")  # as the generator of 0.7 and of 0.6 writes it

# What the compiled files include beyond flashinfer's own tree, and the PyPI package that has it.
HEADERS = {
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "cuda_fp4.h": "nvidia-cuda-runtime",
    "cublas_v2.h": "nvidia-cublas",
    "cublasLt.h": "nvidia-cublas",
    "curand_kernel.h": "nvidia-curand",
    "nvrtc.h": "nvidia-cuda-nvrtc",
}
PROGRAMS = {"ninja": "ninja", "c++": "Debian's g++", "strip": "Debian's binutils"}
PYTHON_MODULES = {
    "torch": "torch",
    "tvm_ffi": "apache-tvm-ffi",
    "packaging": "packaging",
    "filelock": "filelock",
}

# flashinfer imports these at start and uses them only to download things and to ask for the driver's name.
UNUSED_IMPORTS = ("pynvml", "requests", "tqdm")
STAND_IN = '''"""Stands in for a package that the fused-MoE call imports and does not use."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise ImportError(f"{__name__} is not installed on this machine, so {name} is missing")

    return absent
'''
PROLOGUE = """# Added by build_kernel.py: last resort for packages that this machine lacks.
import os as _os
import sys as _sys

_sys.path.append(_os.path.join(_os.path.dirname(__file__), "_carried"))

"""
GENERATOR = "import build_kernel, sys; build_kernel.write_build(*sys.argv[1:])"
WORKSPACE_TILE = (128, 64, 256)  # the runner asks this launcher how large the workspace has to be


class KernelPath(NamedTuple):
    """One kind of call: its activations, and what of the sources it needs.

    Attributes:
        activation, output: the GEMM's first type and its result's, as the generator of launchers writes them.
        source: the file that instantiates its GEMM runner.
        runner: its `CutlassMoeFCRunner<...>`, a pattern for the arguments with single spaces.
        gemm_runner: its `MoeGemmRunner<...>` likewise, where `source` has others too.
        condition: when the binding constructs it.
        members: what the binding sets with it.
    """

    activation: str
    output: str
    source: str
    runner: str
    gemm_runner: str | None
    condition: str
    members: str


def _w4a8(output: str, dtype: str) -> KernelPath:
    """FP8 activations, made of an input that has the output's type; `dtype` is the binding's name of it."""
    mode = "Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0"
    return KernelPath(
        activation="__nv_fp8_e4m3",
        output=output,
        source="moe_gemm_kernels_fp8_fp4.cu",
        runner=f"__nv_fp8_e4m3, Fp4Type, {output}, {output}, {output}, false, {mode}",
        gemm_runner=f"__nv_fp8_e4m3, Fp4Type, {output}, {output}, false, {mode}",
        condition=f"isWMxfp4AFp8HummingQuant() && mActivationDtype == {dtype}",
        members=f"      mSm90Wfp4Afp8Mode = kernels::{mode};\n",
    )


KERNEL_PATHS = {
    "w4a16": KernelPath(
        activation="__nv_bfloat16",
        output="__nv_bfloat16",
        source="moe_gemm_kernels_bf16_fp4.cu",
        runner=r"__nv_bfloat16, (?:kernels::)?(?:Fp4Type|__nv_fp4_e2m1)",
        gemm_runner=None,
        condition="isWFP4A16Quant() && mActivationDtype == dl_bfloat16",
        members="",
    ),
    "w4a8": _w4a8("__nv_bfloat16", "dl_bfloat16"),
    "w4a8-fp16": _w4a8("half", "dl_float16"),
}


class BuildError(Exception):
    """A build that can't go on; the message says what is missing or did not match, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when the archive was written, 1 with a message when it could not be."""
    args = _parser().parse_args(argv)
    try:
        build(args)
    except BuildError as error:
        print(f"build_kernel: {error}", file=sys.stderr)
        return 1
    return 0


def build(args: argparse.Namespace) -> None:
    """Check, copy, generate, compile, strip and pack, in this order."""
    package = find_flashinfer(args.flashinfer)
    version = read_version(package)
    variant = "-".join([*(path for path in args.paths if path != "w4a16"), args.clusters])
    out = args.out or Path(f"flashinfer-{version}-sm90-mxfp4-{variant}.tar.xz")
    if args.tiles:
        parse_tiles(args.tiles)
    if args.jobs < 1:
        raise BuildError(f"--jobs: expected at least 1, got {args.jobs}")
    if not out.name.endswith(".tar.xz"):
        raise BuildError(f"--out: expected a name that ends in .tar.xz, got {out}")
    if args.tvm_ffi is not None and not zipfile.is_zipfile(args.tvm_ffi):
        raise BuildError(f"--tvm-ffi: expected an apache-tvm-ffi wheel, got {args.tvm_ffi}")
    cuda_home = args.cuda_home or find_cuda_home()
    include_dirs = [cuda_home / "include", *args.include_dir, *wheel_include_dirs(sys.path)]
    include_dirs = [directory.resolve() for directory in include_dirs]
    missing = find_missing(cuda_home, include_dirs)
    if missing:
        raise BuildError("missing for this build:\n" + "\n".join(f"  {line}" for line in missing))
    nvcc = nvcc_version(cuda_home)

    workdir = (args.workdir or Path("build") / f"flashinfer-{version}-{variant}").resolve()
    paths = ",".join(args.paths)
    print(
        f"flashinfer {version} from {package}, {paths}, nvcc {nvcc}, clusters {args.clusters}, work in {workdir}"
    )
    claim(workdir)
    make_private_copy(package, workdir / "flashinfer", args.paths)
    stubs = make_stub_libraries(workdir / "stubs", nvcc, cuda_home)
    plan = generate(workdir, cuda_home, stubs, [paths, args.clusters, args.tiles or ""])
    print(f"{len(plan['sources'])} files, {len(plan['launchers'])} kernel launchers")

    start = time.monotonic()
    run_ninja(plan, include_dirs, args.jobs)
    seconds = time.monotonic() - start
    log, rules = Path(plan["directory"], ".ninja_log"), Path(plan["ninja"])
    compiled = ninja_times(log.read_text(), rules.read_text())
    library = workdir / f"{MODULE}.so"
    run_tool(["strip", "--strip-unneeded", "-o", str(library), plan["library"]])

    module = library.read_bytes()
    facts = {
        "flashinfer": version,
        "paths": args.paths,
        "clusters": args.clusters,
        "launchers": plan["launchers"],
        "nvcc": nvcc,
        "module_bytes": len(module),
        "module_sha256": sha256(module),
        "tvm_ffi": args.tvm_ffi.name if args.tvm_ffi else None,
        "compile_seconds": {name: round(took, 1) for name, took in sorted(compiled.items())},
    }
    members = collect_members(package, module, facts, args.tvm_ffi)
    write_archive(out, members)
    for name, took in sorted(compiled.items(), key=lambda item: -item[1]):
        print(f"{took:8.1f} s  {name}")
    print(f"compiled in {seconds:.0f} s with {args.jobs} jobs ({sum(compiled.values()):.0f} s of one job)")
    print(f"module  {len(module):>10,} bytes  sha256 {facts['module_sha256']}")
    print(f"archive {out.stat().st_size:>10,} bytes  sha256 {sha256(out.read_bytes())}  {out}")
    if not args.keep_workdir:
        shutil.rmtree(workdir)


def claim(workdir: Path) -> None:
    """Take a folder to build in, which is removed afterwards: a new or an empty one, or that of an earlier build."""
    marker = workdir / ".build_kernel"
    if workdir.exists() and not marker.exists() and any(workdir.iterdir()):
        raise BuildError(f"--workdir: expected an empty folder, or that of an earlier build, got {workdir}")
    workdir.mkdir(parents=True, exist_ok=True)
    marker.touch()


def usable_cores() -> int:
    """Return how many cores this process may run on, which a container or taskset can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- what is there ---------------------------------------------------------------------------------------


def find_flashinfer(path: Path | None) -> Path:
    """Return the package directory: `path`, the `flashinfer` in it, or the importable one."""
    if path is None:
        spec = importlib.util.find_spec("flashinfer")
        if spec is None or spec.origin is None:
            raise BuildError(
                "flashinfer is not importable: install flashinfer-python, or unpack its wheel and name the "
                "folder with --flashinfer"
            )
        return Path(spec.origin).resolve().parent
    for candidate in (path, path / "flashinfer"):
        if (candidate / "jit" / "fused_moe.py").is_file():
            return candidate.resolve()
    raise BuildError(
        f"--flashinfer: expected a flashinfer-python package, found no jit/fused_moe.py in {path}"
    )


def read_version(package: Path) -> str:
    """Return the release from the package's build metadata."""
    metadata = package / "_build_meta.py"
    found = re.search(r'^__version__ = "([^"]+)"', metadata.read_text() if metadata.is_file() else "", re.M)
    if found is None:
        raise BuildError(f"{metadata}: no __version__ there, so this is no released flashinfer-python")
    return found[1]


def find_cuda_home() -> Path:
    """Return the CUDA toolkit: CUDA_HOME, CUDA_PATH, the nvcc on the PATH, or /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    on_path = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(named)] if named else [*on_path, Path("/usr/local/cuda")]:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    raise BuildError(
        "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h): install nvcc (PyPI: nvidia-cuda-nvcc and "
        "nvidia-cuda-runtime) and name its folder with --cuda-home or CUDA_HOME"
    )


def wheel_include_dirs(search_path: Iterable[str]) -> list[Path]:
    """Return the include folders of NVIDIA's wheels that are installed for this Python."""
    return [found for entry in search_path for found in sorted(Path(entry).glob("nvidia/*/include"))]


def nvcc_version(cuda_home: Path) -> str:
    """Return nvcc's version, such as 13.0.88."""
    nvcc = cuda_home / "bin" / "nvcc"
    found = re.search(r"\bV(\d+\.\d+\.\d+)", run_tool([str(nvcc), "--version"]) if nvcc.is_file() else "")
    if found is None:
        raise BuildError(f"{nvcc}: not an nvcc that tells its version (PyPI: nvidia-cuda-nvcc)")
    return found[1]


def find_missing(cuda_home: Path, include_dirs: Sequence[Path]) -> list[str]:
    """Return a line for everything that the build needs and can't find, with the package that has it."""
    version = nvcc_version(cuda_home)
    lines = []
    if tuple(map(int, version.split(".")[:2])) < OLDEST_CUDA:
        wanted = ".".join(map(str, OLDEST_CUDA))
        lines.append(f"nvcc {wanted} or newer, found {version} (package: nvidia-cuda-nvcc)")
    for program, provider in PROGRAMS.items():
        if shutil.which(program) is None:
            lines.append(f"program {program} (package: {provider})")
    for header, provider in HEADERS.items():
        if not any((directory / header).is_file() for directory in include_dirs):
            lines.append(f"header {header} (package: {provider}; --include-dir names a folder that has it)")
    for name, provider in PYTHON_MODULES.items():
        if importlib.util.find_spec(name) is None:
            lines.append(f"Python module {name} (package: {provider})")
    return lines


# ---- the private copy ------------------------------------------------------------------------------------


def keep_runners(text: str, *, template: str, wanted: Sequence[str]) -> str:
    """Drop the explicit instantiations of a runner but those whose arguments one of the patterns describes."""
    instantiation = re.compile(rf"template class {template}<([^;]*?)>;")

    def is_wanted(arguments: str, patterns: Sequence[str]) -> bool:
        return any(re.fullmatch(pattern, " ".join(arguments.split())) for pattern in patterns)

    for pattern in wanted:
        found = [arguments for arguments in instantiation.findall(text) if is_wanted(arguments, [pattern])]
        if len(found) != 1:
            raise BuildError(f"expected one {template}<{pattern}>, found {len(found)}: new release?")
    return instantiation.sub(lambda found: found[0] if is_wanted(found[1], wanted) else "", text)


def keep_fused_runners(text: str, paths: Sequence[str]) -> str:
    """Drop the explicit instantiations of every fused-MoE runner but those of the paths."""
    wanted = [KERNEL_PATHS[path].runner for path in paths]
    return keep_runners(text, template="CutlassMoeFCRunner", wanted=wanted)


def keep_constructors(text: str, paths: Sequence[str]) -> str:
    """Leave only the paths' branches in the constructor of the binding's runner."""
    start, end = "    // keep consistent with cpp/tensorrt_llm/plugins", "    if (!mKernelRunner) {"
    weight = re.search(r"CutlassMoeFCRunner<__nv_bfloat16, ((?:kernels::)?(?:Fp4Type|__nv_fp4_e2m1))>", text)
    known = text.count(start) == 1 and text.count(end) == 1 and weight is not None
    if not known or not all(KERNEL_PATHS[path].condition.split("()")[0] in text for path in paths):
        raise BuildError("the binding's constructor does not look as in the known releases: new release?")
    branches = ""
    for path in map(KERNEL_PATHS.__getitem__, paths):
        arguments = f"__nv_bfloat16, {weight[1]}" if path.gemm_runner is None else path.runner
        arguments = re.sub(r"\b(?<!:)(Fp4Type|Sm90Wfp4Afp8ScaleMode)", r"kernels::\1", arguments)
        branches += f"""    if ({path.condition}) {{
      mInnerDimMultiplier = 2;
{path.members}      mKernelRunner = std::make_shared<kernels::CutlassMoeFCRunner<{arguments}>>();
    }}
"""
    return text[: text.index(start)] + branches + text[text.index(end) :]


def add_prologue(text: str) -> str:
    """Make flashinfer's __init__ look last into the folder of carried packages."""
    found = re.search(r"^(?:import|from) (?!__future__)", text, re.M)
    if found is None:
        raise BuildError("flashinfer/__init__.py imports nothing: new release?")
    return text[: found.start()] + PROLOGUE + text[found.start() :]


def split_kernel_files(text: str) -> str:
    """Put half as many launchers into a generated file: eight of one take 11 GB to compile."""
    stock = "GROUP_SIZE = 8"
    if text.count(stock) != 1:
        raise BuildError(f"generate_kernels.py does not say {stock} as in the known releases: new release?")
    return text.replace(stock, "GROUP_SIZE = 4")


BACKEND = "data/csrc/fused_moe/cutlass_backend"
GEMMS = "data/csrc/nv_internal/tensorrt_llm/kernels/cutlass_kernels/moe_gemm"


def patches(paths: Sequence[str]) -> dict[str, Callable[[str], str]]:
    """The files of the package that the copy has as its own; env.py because it finds the sources by its own place."""
    wanted: dict[str, list[str]] = {}
    for path in map(KERNEL_PATHS.__getitem__, paths):
        if path.gemm_runner is not None:
            wanted.setdefault(f"{GEMMS}/{path.source}", []).append(path.gemm_runner)
    of_gemms = {
        source: functools.partial(keep_runners, template="MoeGemmRunner", wanted=runners)
        for source, runners in wanted.items()
    }
    return {
        "__init__.py": add_prologue,
        "jit/env.py": lambda text: text,
        "jit/gemm/cutlass/generate_kernels.py": split_kernel_files,
        f"{BACKEND}/cutlass_fused_moe_instantiation.cu": functools.partial(keep_fused_runners, paths=paths),
        f"{BACKEND}/flashinfer_cutlass_fused_moe_binding.cu": functools.partial(
            keep_constructors, paths=paths
        ),
        **of_gemms,
    }


def make_private_copy(package: Path, copy: Path, paths: Sequence[str]) -> None:
    """Mirror the package with symbolic links, except for the patched files; the package stays untouched."""
    patched = patches(paths)
    missing = [name for name in patched if not (package / name).is_file()]
    if missing:
        raise BuildError(f"{package}: no {missing[0]} there: new release?")
    _link_tree(package, copy, {Path(name) for name in patched})
    for name, patch in patched.items():
        _write_if_changed(copy / name, patch((package / name).read_text()))
    for name, text in carried_modules().items():
        _write_if_changed(copy / "_carried" / name, text)


def carried_modules() -> dict[str, str]:
    """Return the small Python files for a machine that lacks what flashinfer imports at start."""
    files = {f"{name}.py": STAND_IN for name in UNUSED_IMPORTS}
    spec = importlib.util.find_spec("packaging")
    if spec is not None and spec.origin is not None:
        for file in sorted(Path(spec.origin).parent.glob("*.py")):
            files[f"packaging/{file.name}"] = file.read_text()
    return files


def make_stub_libraries(directory: Path, nvcc: str, cuda_home: Path) -> Path:
    """Make an empty library for each one that only the machine with the GPU needs to have."""
    directory.mkdir(parents=True, exist_ok=True)
    major = nvcc.partition(".")[0]
    sonames = {"cuda": "libcuda.so.1", "cudart": f"libcudart.so.{major}", "nvrtc": f"libnvrtc.so.{major}"}
    for name, soname in sonames.items():
        library = directory / f"lib{name}.so"
        found = [cuda_home / sub / library.name for sub in ("lib64", "lib64/stubs")]
        if library.exists() or any(path.exists() for path in found):
            continue
        empty = ["-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{soname}"]
        run_tool(["c++", *empty, "-o", str(library)])
    return directory


# ---- the build -------------------------------------------------------------------------------------------


def generate(workdir: Path, cuda_home: Path, stubs: Path, choice: Sequence[str]) -> dict[str, Any]:
    """Let the copy of flashinfer write its ninja build, in a process of its own; return what it wrote."""
    # no-as-needed keeps the stubs' names in the module, lazy lets it load with symbols that are never called
    flags = [f"-L{stubs}", "-Wl,--no-as-needed", "-Wl,-z,lazy", "-lcuda"]
    search = [str(workdir), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "CUDA_HOME": str(cuda_home),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        "FLASHINFER_EXTRA_LDFLAGS": shlex.join(flags),
        "FLASHINFER_WORKSPACE_BASE": str(workdir),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
    }
    plan = workdir / "plan.json"
    run_tool([sys.executable, "-c", GENERATOR, str(plan), *choice], environment)
    result: dict[str, Any] = json.loads(plan.read_text())
    return result


def write_build(plan: str, paths: str, clusters: str, tiles: str) -> None:
    """Write the trimmed ninja build with the flashinfer that is importable here, and say in `plan` what."""
    import flashinfer.jit.fused_moe as fused_moe
    from flashinfer.jit.gemm.cutlass import generate_kernels as kernels

    type_names = kernels.CudaTypeName
    chosen = [KERNEL_PATHS[path] for path in paths.split(",")]
    wanted = [
        op
        for op in kernels.generate_sm90_mixed_type_grouped_gemm_operations(True)
        if type_names[op.weight_type] in MXFP4_TYPES
        and (type_names[op.act_type], type_names[op.output_type])
        in [(path.activation, path.output) for path in chosen]
    ]
    only = {*parse_tiles(tiles), WORKSPACE_TILE} if tiles else None
    built = [
        op
        for op in wanted
        if is_used(op)
        and (clusters == "all" or tuple(op.cga_shape) == ONE_CTA)
        and (only is None or tuple(op.cta_shape) in only)
    ]
    absent = [op for op in wanted if op not in built]
    kernels.generate_sm90_operations = lambda enabled: built
    kernels.generate_sm80_operations = lambda enabled: []

    extra = Path(plan).with_name("absent_launchers.cu")
    if absent:
        texts = [kernels.instantiate_operation(op) for op in absent]
        _write_if_changed(extra, refuse_launchers(texts))
    stock_spec = fused_moe.gen_jit_spec

    def trimmed_spec(name: str, sources: Sequence[Path], **options: object) -> object:
        kept = [source for source in sources if not is_other_type(Path(source).name, chosen)]
        return stock_spec(name, [*kept, *([extra] if absent else [])], **options)

    fused_moe.gen_jit_spec = trimmed_spec
    spec = fused_moe.gen_cutlass_fused_moe_sm90_module()
    if not built or spec.name != MODULE:
        raise BuildError(f"no kernels of {paths} for SM90, or a module other than {MODULE}: new release?")
    spec.write_ninja()
    ninja = spec.ninja_path.read_text()
    spec.ninja_path.write_text(re.sub(r"^rule .*$", r"\g<0>\n  description = $out", ninja, flags=re.M))
    facts = {
        "ninja": str(spec.ninja_path),
        "directory": str(spec.build_dir),
        "library": str(spec.jit_library_path),
        "sources": [str(source) for source in spec.sources],
        "launchers": sorted({describe_launcher(op) for op in built}),
    }
    Path(plan).write_text(json.dumps(facts, indent=1))


def run_ninja(plan: Mapping[str, Any], include_dirs: Sequence[Path], jobs: int) -> None:
    """Compile and link what is not up to date, and show progress and messages, but not ptxas's remarks."""
    # host-only files find CUDA's headers by CPATH alone
    environment = os.environ | {"CPATH": os.pathsep.join(map(str, include_dirs))}
    command = ["ninja", "-C", plan["directory"], "-f", plan["ninja"], "-j", str(jobs)]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as ninja:
        for line in ninja.stdout or ():
            if not line.startswith("ptxas info"):
                print(line, end="", flush=True)
    if ninja.returncode != 0:
        raise BuildError("a file did not compile (its messages are above); the same command tries again")


def is_other_type(source: str, paths: Iterable[KernelPath]) -> bool:
    """Say whether a source file holds GEMM runners of other types than the paths'."""
    return source.startswith("moe_gemm_kernels_") and source not in [path.source for path in paths]


def is_used(operation: Any) -> bool:
    """Say whether a tactic has this launcher's schedule; of a large tile's two only one is ever used."""
    if single_warpgroup_kind(operation):
        return True
    tile = tuple(operation.cta_shape)
    pingpong = tile[0] < 128 or tile == (128, 128, 512)
    return str(operation.mainloop_schedule).endswith("Pingpong" if pingpong else "Cooperative")


def single_warpgroup_kind(operation: Any) -> str:
    """The kind of a kernel of W4A8 that has one warpgroup, such as `single_warpgroup_rolling`; empty for others."""
    kind = getattr(operation, "sm90_mixed_input_kernel_type", "warp_specialized")
    return "" if kind == "warp_specialized" else kind


def describe_launcher(operation: Any) -> str:
    """Return an operation's tile, cluster and schedule, such as `64x16x128 1x1 pingpong`."""
    tile = "x".join(str(size) for size in operation.cta_shape)
    cluster = "x".join(str(size) for size in operation.cga_shape[:2])
    schedule = str(operation.mainloop_schedule).rpartition("TmaWarpSpecialized")[2].lower()
    return f"{tile} {cluster} {single_warpgroup_kind(operation) or schedule}"


def parse_tiles(text: str) -> list[tuple[int, ...]]:
    """`64x16x128,128x64x256` as tuples."""
    if not re.fullmatch(r"\d+x\d+x\d+(,\d+x\d+x\d+)*", text):
        raise BuildError(f"--tiles: expected tiles such as 64x16x128,128x64x256, got {text}")
    return [tuple(map(int, tile.split("x"))) for tile in text.split(",")]


def refuse_launchers(instantiations: Iterable[str]) -> str:
    """Turn instantiations of launchers into specializations that throw, so that the tuner can pass on."""
    refusals = []
    for text in instantiations:
        text, starts = re.subn(r"template void ", "template <> void ", text)
        text, ends = re.subn(
            r"size_t\s*\*\s*workspace_size\s*\);", "size_t* workspace_size) { refuse(); }", text
        )
        if starts != 1 or ends != 1:
            raise BuildError(f"a launcher's instantiation does not look as known: new release?\n{text}")
        refusals.append(text)
    return f"""#include <stdexcept>
#include "tensorrt_llm/kernels/cutlass_kernels/moe_gemm/launchers/moe_gemm_tma_ws_mixed_input_launcher.inl"

namespace tensorrt_llm::kernels::cutlass_kernels_oss {{
static void refuse() {{
  throw std::runtime_error("not in this trimmed build (build_kernel.py --clusters all, without --tiles, has all)");
}}
{"".join(refusals)}
}}  // namespace tensorrt_llm::kernels::cutlass_kernels_oss
"""


def ninja_times(log: str, build: str) -> dict[str, float]:
    """Return the seconds that each output of a ninja build took, whenever that was, from its .ninja_log."""
    rows = [line.split("\t") for line in log.splitlines() if line and not line.startswith("#")]
    return {
        Path(output).name: (int(end) - int(start)) / 1000
        for start, end, _, output, _ in rows
        if f"build {output}:" in build
    }


# ---- the archive -----------------------------------------------------------------------------------------


def collect_members(
    package: Path, module: bytes, facts: Mapping[str, object], tvm_ffi: Path | None
) -> dict[str, bytes]:
    """Return the archive's files: flashinfer's Python, the module at its AOT place, and what goes with it."""
    members = {
        f"flashinfer/{file.relative_to(package).as_posix()}": file.read_bytes()
        for pattern in ("*.py", "*.json")
        for file in package.rglob(pattern)
        if file.relative_to(package).parts[0] != "data"
    }
    members["flashinfer/__init__.py"] = add_prologue((package / "__init__.py").read_text()).encode()
    for name, text in carried_modules().items():
        members[f"flashinfer/_carried/{name}"] = text.encode()
    members[f"flashinfer/data/aot/{MODULE}/{MODULE}.so"] = module
    members["build.json"] = (json.dumps(facts, indent=1) + "\n").encode()
    if tvm_ffi is not None:
        with zipfile.ZipFile(tvm_ffi) as wheel:
            members |= {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    return members


def write_archive(out: Path, members: Mapping[str, bytes]) -> None:
    """Write a .tar.xz whose bytes depend on nothing but the members, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".writing-{os.getpid()}")
    try:
        _write_archive(partial, members)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    if out.stat().st_size > ARCHIVE_LIMIT:
        raise BuildError(f"{out} has {out.stat().st_size:,} bytes, more than {ARCHIVE_LIMIT:,}")


def _write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(members):
            entry = tarfile.TarInfo(name)
            entry.size = len(members[name])
            archive.addfile(entry, io.BytesIO(members[name]))


def sha256(data: bytes) -> str:
    """Return the digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def run_tool(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return what it printed; its messages become the error when it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


def _paths(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) != len(names) or not set(names) <= set(KERNEL_PATHS):
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(KERNEL_PATHS)}, got {text}")
    return names


def _link_tree(source: Path, target: Path, real: set[Path]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        link = target / entry.name
        inside = {path.relative_to(entry.name) for path in real if path.parts[0] == entry.name}
        if inside and link.is_symlink():
            link.unlink()  # left by a build that patched less: never write through it
        if inside and entry.is_dir():
            _link_tree(entry, link, inside)
        elif not inside and not link.is_symlink() and entry.name != "__pycache__":
            link.symlink_to(entry)


def _write_if_changed(path: Path, text: str) -> None:
    # an untouched file keeps its time, so that ninja does not compile it again
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flashinfer", type=Path, help="the package, or the folder with it (default: importable)"
    )
    parser.add_argument(
        "--paths",
        type=_paths,
        default=["w4a16"],
        metavar="PATH[,PATH]",
        help="w4a16 (bf16 activations, the default), w4a8 (FP8 activations made of bf16, use_wfp4afp8_humming) and "
        "w4a8-fp16 (of fp16)",
    )
    parser.add_argument("--tiles", help="only these tiles, such as 64x16x128,128x64x256 (default: all)")
    parser.add_argument(
        "--clusters", choices=("one", "all"), default="one", help="thread-block clusters to build"
    )
    parser.add_argument(
        "--jobs", type=int, default=usable_cores(), help="compiles at a time, up to 6 GB each"
    )
    parser.add_argument("--out", type=Path, help="the archive, a .tar.xz")
    parser.add_argument(
        "--tvm-ffi", type=Path, metavar="WHEEL", help="apache-tvm-ffi for the GPU machine's Python"
    )
    parser.add_argument("--cuda-home", type=Path, help="the CUDA toolkit (default: CUDA_HOME, or nvcc's)")
    parser.add_argument(
        "--include-dir", type=Path, action="append", default=[], help="where more headers lie"
    )
    parser.add_argument(
        "--workdir", type=Path, help="where to build (default: build/flashinfer-VERSION-CLUSTERS)"
    )
    parser.add_argument("--keep-workdir", action="store_true", help="leave the objects there after success")
    return parser


if __name__ == "__main__":
    sys.exit(main())
