"""The pure parts of tools/hardware/build_kernel.py: what it checks, patches, packs and says. Nothing is compiled."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.tools import load_tool

tool = load_tool("hardware/build_kernel.py")

PATHS = ["w4a16", "w4a8"]

INSTANTIATION = """namespace n {
template class CutlassMoeFCRunner<float, float>;
// template class CutlassMoeFCRunner<__nv_fp8_e4m3, __nv_fp8_e4m3>;
#ifdef ENABLE_FP4
template class CutlassMoeFCRunner<__nv_fp8_e4m3, Fp4Type, half, half, half, false,
                                  Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>;
template class CutlassMoeFCRunner<Fp4Type, Fp4Type, __nv_bfloat16>;
template class CutlassMoeFCRunner<__nv_fp8_e4m3, Fp4Type, __nv_bfloat16, __nv_bfloat16,
                                  __nv_bfloat16, false, Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>;
template class CutlassMoeFCRunner<__nv_bfloat16,
                                  Fp4Type>;
#endif
INSTANTIATE_FINALIZE_MOE_ROUTING(half, half, half);
}
"""
BINDING = """  FusedMoeRunner(...) {
    mInnerDimMultiplier = 1;

    // keep consistent with cpp/tensorrt_llm/plugins/x.cpp
    if (mActivationDtype == dl_float16) {
      mKernelRunner = std::make_shared<kernels::CutlassMoeFCRunner<half, half>>();
    }
    if (isWMxfp4AFp8HummingQuant()) {
      make_humming_runner();
    }
    if (isWFP4A16Quant()) {
      mKernelRunner = std::make_shared<kernels::CutlassMoeFCRunner<__nv_bfloat16, WEIGHT>>();
    }
    if (!mKernelRunner) {
      TVM_FFI_ICHECK(false);
    }
"""
LAUNCHER = """
template void launcher<__nv_bfloat16, SafeFP4, cute::Shape<cute::Int<64>>> (
GroupedGemmInput<__nv_bfloat16>inputs, int sm_count_, size_t* workspace_size);
"""
GEMMS = """template class MoeGemmRunner<__nv_fp8_e4m3, Fp4Type, half>;
template class MoeGemmRunner<__nv_fp8_e4m3, Fp4Type, __nv_bfloat16>;
template class MoeGemmRunner<__nv_fp8_e4m3, Fp4Type, __nv_bfloat16, __nv_bfloat16, false,
                             Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>;
"""
INIT = '"""Docstring."""\n\nfrom __future__ import annotations\n\nimport contextlib\n\nfrom . import jit\n'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A flashinfer in miniature: every patched file, a few that are not, and data that must not travel."""
    root = tmp_path / "site" / "flashinfer"
    files = {
        "__init__.py": INIT,
        "_build_meta.py": '"""Meta."""\n__version__ = "0.7.2.post1"\n',
        "jit/__init__.py": "",
        "jit/env.py": "HERE = __file__\n",
        "jit/fused_moe.py": "",
        "jit/gemm/cutlass/generate_kernels.py": "    GROUP_SIZE = 8\n",
        "tuning_configs/h100.json": "{}",
        "notes.txt": "not Python",
        f"{tool.BACKEND}/cutlass_fused_moe_instantiation.cu": INSTANTIATION,
        f"{tool.BACKEND}/flashinfer_cutlass_fused_moe_binding.cu": BINDING.replace(
            "WEIGHT", "kernels::Fp4Type"
        ),
        f"{tool.GEMMS}/moe_gemm_kernels_fp8_fp4.cu": GEMMS,
        "data/cutlass/include/cute.hpp": "// big",
        "data/build_backend.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A CUDA toolkit that has a talking nvcc and the toolkit's own headers, and no library headers."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    set_nvcc(home, "13.0")
    for header in ("cuda_runtime.h", "cuda_fp4.h"):
        (home / "include" / header).write_text("")
    return home


def set_nvcc(home: Path, release: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)


# ---- what is there ---------------------------------------------------------------------------------------


def test_the_package_is_found_by_its_own_folder_and_by_the_folder_with_it(package: Path) -> None:
    assert tool.find_flashinfer(package) == package
    assert tool.find_flashinfer(package.parent) == package
    assert tool.read_version(package) == "0.7.2.post1"


def test_a_folder_without_flashinfer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tool.BuildError, match=r"--flashinfer: expected a flashinfer-python package"):
        tool.find_flashinfer(tmp_path)


def test_a_source_tree_without_a_version_is_refused(package: Path) -> None:
    (package / "_build_meta.py").unlink()
    with pytest.raises(tool.BuildError, match="no released flashinfer-python"):
        tool.read_version(package)


def test_an_absent_flashinfer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tool.BuildError, match="install flashinfer-python"):
        tool.find_flashinfer(None)


def test_everything_missing_is_named_at_once_with_its_package(
    cuda_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_nvcc(cuda_home, "12.4")
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    lines = tool.find_missing(cuda_home, [cuda_home / "include"])
    assert lines[0] == "nvcc 12.8 or newer, found 12.4.88 (package: nvidia-cuda-nvcc)"
    assert "program ninja (package: ninja)" in lines
    assert any("curand_kernel.h" in line and "nvidia-curand" in line for line in lines)
    assert any("nvrtc.h" in line and "nvidia-cuda-nvrtc" in line for line in lines)
    assert any("tvm_ffi" in line and "apache-tvm-ffi" in line for line in lines)
    assert not any("cuda_runtime.h" in line for line in lines)
    assert len(lines) == 1 + len(tool.PROGRAMS) + len(tool.HEADERS) - 2 + len(tool.PYTHON_MODULES)


def test_nothing_is_missing_when_all_is_there(cuda_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = cuda_home.parent / "site-packages" / "nvidia" / "cu13" / "include"
    wheels.mkdir(parents=True)
    for header in tool.HEADERS:
        (wheels / header).write_text("")
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: SimpleNamespace())
    found = tool.wheel_include_dirs([str(cuda_home.parent / "site-packages")])
    assert found == [wheels]
    assert tool.find_missing(cuda_home, [cuda_home / "include", *found]) == []


def test_cuda_home_comes_from_the_environment_or_is_asked_for(
    cuda_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    assert tool.find_cuda_home() == cuda_home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(tool.BuildError, match="--cuda-home or CUDA_HOME"):
        tool.find_cuda_home()


def test_the_command_line_reports_what_is_missing_and_fails(
    package: Path, cuda_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "wheel_include_dirs", lambda search_path: [])
    status = tool.main(["--flashinfer", str(package), "--cuda-home", str(cuda_home)])
    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith("build_kernel: missing for this build:\n")
    assert "header cublas_v2.h (package: nvidia-cublas; --include-dir names a folder that has it)" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--out", "kernel.zip", "expected a name that ends in"),
        ("--jobs", "0", "expected at least 1"),
        ("--tiles", "64x16", "expected tiles such as 64x16x128"),
        ("--tvm-ffi", "x.whl", "expected an apache-tvm-ffi"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_built(
    package: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert tool.main(["--flashinfer", str(package), option, value]) == 1
    assert f"{option}: {message}" in capsys.readouterr().err


# ---- the private copy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["Fp4Type", "__nv_fp4_e2m1"])
def test_only_the_mxfp4_runner_is_instantiated(weight: str) -> None:
    kept = tool.keep_fused_runners(INSTANTIATION.replace("Fp4Type", weight), ["w4a16"])
    assert kept.count("template class") == 1
    assert (
        f"template class CutlassMoeFCRunner<__nv_bfloat16,\n                                  {weight}>;"
        in kept
    )
    assert "INSTANTIATE_FINALIZE_MOE_ROUTING(half, half, half);" in kept


@pytest.mark.parametrize("weight", ["kernels::Fp4Type", "__nv_fp4_e2m1"])
def test_only_the_mxfp4_branch_is_constructed(weight: str) -> None:
    kept = tool.keep_constructors(BINDING.replace("WEIGHT", weight), ["w4a16"])
    assert kept.count("make_shared") == 1
    assert f"CutlassMoeFCRunner<__nv_bfloat16, {weight}>>();" in kept
    assert (
        kept.index("mInnerDimMultiplier = 1;") < kept.index("isWFP4A16Quant()") < kept.index("!mKernelRunner")
    )


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ("keep_fused_runners", INSTANTIATION.replace("template class CutlassMoeFCRunner<__nv_bfloat16", "")),
        ("keep_constructors", BINDING.replace("// keep consistent", "// keep")),
        ("keep_constructors", BINDING),
        ("keep_constructors", BINDING.replace("WEIGHT", "Fp4Type").replace("AFp8Humming", "AFp8")),
        ("split_kernel_files", "GROUP_SIZE = 16"),
        ("add_prologue", '"""Nothing."""'),
    ],
)
def test_a_source_that_looks_otherwise_is_refused(patch: str, text: str) -> None:
    paths = [["w4a16", "w4a8"]] if patch.startswith("keep") else []
    with pytest.raises(tool.BuildError, match="new release"):
        getattr(tool, patch)(text, *paths)


def test_what_w4a8_needs_is_kept() -> None:
    kept = tool.keep_fused_runners(INSTANTIATION, ["w4a8"])
    assert kept.count("template class") == 1
    assert "__nv_bfloat16, false, Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>;" in kept
    assert tool.keep_fused_runners(INSTANTIATION, ["w4a16", "w4a8"]).count("template class") == 2
    (gemms,) = [patch for name, patch in tool.patches(["w4a8"]).items() if name.startswith(tool.GEMMS)]
    assert gemms(GEMMS).count("template class") == 1
    assert gemms(GEMMS).strip().endswith("Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>;")
    binding = BINDING.replace("WEIGHT", "kernels::Fp4Type")
    kept = tool.keep_constructors(binding, ["w4a8"])
    assert kept.count("make_shared") == 1
    assert "CutlassMoeFCRunner<__nv_fp8_e4m3, kernels::Fp4Type, __nv_bfloat16, __nv_bfloat16" in kept
    assert "false, kernels::Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0>>();" in kept
    assert "mSm90Wfp4Afp8Mode = kernels::Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0;" in kept
    assert tool.keep_constructors(binding, ["w4a16", "w4a8"]).count("make_shared") == 2


def test_both_dtypes_of_w4a8_keep_their_runners_in_one_file() -> None:
    def of(dtype: str) -> str:
        mode = "Sm90Wfp4Afp8ScaleMode::kHummingPreMmaE8M0"
        return f"template class MoeGemmRunner<__nv_fp8_e4m3, Fp4Type, {dtype}, {dtype}, false, {mode}>;"

    text = "\n".join((of("half"), of("__nv_bfloat16"), of("float")))
    for paths, kept in ((["w4a8-fp16"], ["half"]), (["w4a8", "w4a8-fp16"], ["half", "__nv_bfloat16"])):
        (gemms,) = [patch for name, patch in tool.patches(paths).items() if name.startswith(tool.GEMMS)]
        assert gemms(text).split("\n")[:2] == [
            of(dtype) if dtype in kept else "" for dtype in ("half", "__nv_bfloat16")
        ]
        assert "float, float" not in gemms(text)
    bound = tool.keep_constructors(BINDING.replace("WEIGHT", "kernels::Fp4Type"), ["w4a8", "w4a8-fp16"])
    assert "isWMxfp4AFp8HummingQuant() && mActivationDtype == dl_float16" in bound
    assert (
        "CutlassMoeFCRunner<__nv_fp8_e4m3, kernels::Fp4Type, half, half, half, false, kernels::Sm90Wfp4"
        in bound
    )


def test_a_release_without_w4a8_is_told(package: Path, tmp_path: Path) -> None:
    (package / tool.GEMMS / "moe_gemm_kernels_fp8_fp4.cu").unlink()
    tool.make_private_copy(package, tmp_path / "one" / "flashinfer", ["w4a16"])
    with pytest.raises(tool.BuildError, match=r"moe_gemm_kernels_fp8_fp4\.cu there: new release"):
        tool.make_private_copy(package, tmp_path / "two" / "flashinfer", ["w4a16", "w4a8"])


def test_the_prologue_comes_after_future_imports_and_before_all_others() -> None:
    text = tool.add_prologue(INIT)
    assert text.index("__future__") < text.index("_carried") < text.index("import contextlib")
    compile(text, "__init__.py", "exec")


def test_the_copy_is_patched_and_the_package_is_not(package: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in package.rglob("*") if file.is_file()}
    copy = tmp_path / "work" / "flashinfer"
    tool.make_private_copy(package, copy, PATHS)
    tool.make_private_copy(package, copy, PATHS)
    for name in tool.patches(PATHS):
        assert (copy / name).is_file()
        assert (copy / name).resolve() == copy.resolve() / name
    assert "_carried" in (copy / "__init__.py").read_text()
    assert (copy / "data" / "cutlass").is_symlink()
    assert (copy / "jit" / "fused_moe.py").resolve() == package / "jit" / "fused_moe.py"
    assert before == {file: file.read_bytes() for file in package.rglob("*") if file.is_file()}


def test_a_link_of_an_older_build_is_never_written_through(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work" / "flashinfer"
    copy.mkdir(parents=True)
    (copy / "jit").symlink_to(package / "jit")
    (copy / "__init__.py").symlink_to(package / "__init__.py")
    tool.make_private_copy(package, copy, PATHS)
    assert (package / "__init__.py").read_text() == INIT
    assert not (copy / "jit").is_symlink()


def test_patching_again_leaves_the_times_alone(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work" / "flashinfer"
    tool.make_private_copy(package, copy, PATHS)
    times = {name: (copy / name).stat().st_mtime_ns for name in tool.patches(PATHS)}
    tool.make_private_copy(package, copy, PATHS)
    assert times == {name: (copy / name).stat().st_mtime_ns for name in tool.patches(PATHS)}


def test_absent_packages_can_be_imported_but_not_used(tmp_path: Path) -> None:
    for name, text in tool.carried_modules().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import requests\n"
        "from tqdm import tqdm\n"
        "try:\n    requests.get('x')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "requests is not installed on this machine, so get is missing\n", done.stderr
    assert "packaging/version.py" in tool.carried_modules()


# ---- the build -------------------------------------------------------------------------------------------


def test_absent_launchers_become_specializations_that_throw() -> None:
    text = tool.refuse_launchers([LAUNCHER, LAUNCHER])
    assert text.count("template <> void launcher<__nv_bfloat16, SafeFP4") == 2
    assert text.count("size_t* workspace_size) { refuse(); }") == 2
    assert text.count("{") == text.count("}")
    with pytest.raises(tool.BuildError, match="new release"):
        tool.refuse_launchers([LAUNCHER.replace("workspace_size", "bytes")])


def test_only_runners_of_other_types_are_dropped() -> None:
    names = ["moe_gemm_kernels_bf16_fp4.cu", "moe_gemm_kernels_fp8_fp4.cu", "moe_gemm_mixed_utils.cu"]
    for paths, others in ((["w4a16"], [False, True, False]), (["w4a8"], [True, False, False])):
        wanted = [tool.KERNEL_PATHS[path] for path in paths]
        assert [tool.is_other_type(name, wanted) for name in names] == others


def test_a_launcher_is_told_by_tile_cluster_and_schedule() -> None:
    operation = SimpleNamespace(
        cta_shape=(64, 16, 128),
        cga_shape=(1, 2, 1),
        mainloop_schedule="KernelScheduleType.TmaWarpSpecializedPingpong",
    )
    assert tool.describe_launcher(operation) == "64x16x128 1x2 pingpong"
    operation.sm90_mixed_input_kernel_type = "single_warpgroup_rolling"
    assert tool.describe_launcher(operation) == "64x16x128 1x2 single_warpgroup_rolling"
    operation.cta_shape = (128, 8, 128)
    assert tool.is_used(operation)


@pytest.mark.parametrize(
    ("tile", "schedule"),
    [
        ((64, 16, 128), "Pingpong"),
        ((128, 16, 512), "Cooperative"),
        ((128, 128, 256), "Cooperative"),
        ((128, 128, 512), "Pingpong"),
        ((256, 256, 128), "Cooperative"),
    ],
)
def test_the_schedule_is_the_one_that_the_tactics_take(tile: tuple[int, int, int], schedule: str) -> None:
    for name in ("Pingpong", "Cooperative"):
        kind = f"KernelScheduleType.TmaWarpSpecialized{name}"
        operation = SimpleNamespace(cta_shape=tile, mainloop_schedule=kind)
        assert tool.is_used(operation) is (name == schedule)


def test_times_come_from_the_last_entry_of_each_output_of_the_build() -> None:
    build = "build /w/a.o: cuda_compile a.cu\nbuild /w/b.o: compile b.cpp\n"
    rows = [(0, 1500, "/w/a.o"), (10, 4010, "/w/b.o"), (0, 2500, "/w/a.o"), (0, 9, "/w/old.o")]
    log = "# ninja log v5\n" + "".join(f"{start}\t{end}\t9\t{output}\tff\n" for start, end, output in rows)
    assert tool.ninja_times(log, build) == {"a.o": 2.5, "b.o": 4.0}


# ---- the archive -----------------------------------------------------------------------------------------


def test_the_archive_holds_the_python_the_module_and_the_facts(package: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "tvm_ffi.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tvm_ffi/", "")
        file.writestr("tvm_ffi/__init__.py", "x = 1")
    members = tool.collect_members(package, b"ELF", {"flashinfer": "0.7.2.post1"}, wheel)
    assert members["flashinfer/data/aot/fused_moe_90/fused_moe_90.so"] == b"ELF"
    assert members["tvm_ffi/__init__.py"] == b"x = 1"
    assert json.loads(members["build.json"]) == {"flashinfer": "0.7.2.post1"}
    assert "flashinfer/tuning_configs/h100.json" in members
    assert "_carried" in members["flashinfer/__init__.py"].decode()
    assert "flashinfer/_carried/requests.py" in members
    assert not any(
        "cutlass/include" in name or name.endswith(("notes.txt", "build_backend.py")) for name in members
    )


def test_the_archive_unpacks_and_depends_on_its_members_alone(tmp_path: Path) -> None:
    members = {"b/two.py": b"2" * 1000, "a.json": b"{}"}
    first, second = tmp_path / "1" / "k.tar.xz", tmp_path / "2" / "k.tar.xz"
    tool.write_archive(first, members)
    tool.write_archive(second, dict(reversed(members.items())))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {name: (tmp_path / "unpacked" / name).read_bytes() for name in members} == members


def test_an_archive_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "ARCHIVE_LIMIT", 100)
    with pytest.raises(tool.BuildError, match="more than 100"):
        tool.write_archive(tmp_path / "k.tar.xz", {"a": bytes(range(256))})


def test_a_failing_program_is_quoted() -> None:
    with pytest.raises(tool.BuildError, match=r"failed:\nno such thing"):
        tool.run_tool([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_a_folder_with_anything_else_is_not_built_in(tmp_path: Path) -> None:
    """It would be removed in the end."""
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(tool.BuildError, match="--workdir: expected an empty folder"):
        tool.claim(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    tool.claim(tmp_path)
    (tmp_path / "build.ninja").write_text("")
    tool.claim(tmp_path)
    tool.claim(tmp_path / "new" / "one")
