"""What is set before jax starts: the environment wins, a container's share is kept, and late is said to be late."""

import os
import pathlib
import platform
import subprocess
import sys
import warnings

import pytest

from jaxrlhf import runtime


def python(code: str, *given: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a process that has none of our settings but these."""
    ours = {setting.name for setting in runtime.defaults()} | {"XLA_FLAGS", "GLIBC_TUNABLES"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, check=True, env=clean | environment
    )


def test_settings_reach_jax_and_the_environment_wins():
    code = (
        "from jaxrlhf import runtime; runtime.configure(); import jax;"
        "print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs);"
        "print(*runtime.report(), sep='\\n')"
    )
    done = python(code, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3", XDG_CACHE_HOME="/tmp/some")
    assert done.stderr == ""
    first, *report = done.stdout.splitlines()
    assert first.startswith("/tmp/some/jaxrlhf/xla-") and first.endswith(" 3.0")
    assert f"JAX_COMPILATION_CACHE_DIR={first.split()[0]} (set by jaxrlhf)" in report
    assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=3 (from the environment)" in report


def test_a_setting_that_comes_too_late_is_named_with_the_remedy():
    share = "from jaxrlhf import runtime; runtime.cpu_quota, runtime._processors = (lambda: 2), (lambda: 4);"
    show = "print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)"
    done = python(f"import jax; {share} runtime.configure(); {show}", XDG_CACHE_HOME="/tmp/some")
    assert done.stderr == "", "no device has been used"
    assert done.stdout.startswith("/tmp/some/jaxrlhf/xla-") and done.stdout.endswith(" 0.0\n")
    code = f"import jax; jax.devices(); {share} runtime.configure(); runtime.configure()"
    done = python(code, JAX_PLATFORMS="cpu")
    assert done.stderr.count("jax had started before jaxrlhf.runtime.configure()") == 1
    assert "so 3 settings have no effect: JAX_COMPILATION_CACHE_DIR=" in done.stderr and "PJRT_NPROC=2" in done.stderr
    assert "before anything uses jax" in done.stderr


def test_python_code_gets_the_settings_too():
    """The first name that needs jax sets them; a config does not."""
    code = "import jaxrlhf, os; jaxrlhf.PPOConfig; print('JAX_COMPILATION_CACHE_DIR' in os.environ);"
    code += "jaxrlhf.ModelConfig; import jax; print(jax.config.jax_compilation_cache_dir)"
    before, after = python(code, XDG_CACHE_HOME="/tmp/some").stdout.split()
    assert before == "False" and after.startswith("/tmp/some/jaxrlhf/xla-")


def test_nothing_to_set_means_nothing_to_say(monkeypatch):
    for setting in runtime.defaults():
        monkeypatch.setenv(setting.name, setting.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.configure()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_of_a_container(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert runtime.cpu_quota(tmp_path) == expected


def test_threads_are_limited_only_by_a_quota_below_the_processors(monkeypatch):
    monkeypatch.setattr(runtime, "_processors", lambda: 8)
    for quota, expected in ((2, {"PJRT_NPROC": "2"}), (8, {}), (None, {})):
        monkeypatch.setattr(runtime, "cpu_quota", lambda quota=quota: quota)
        assert {s.name: s.value for s in runtime.defaults() if s.name == "PJRT_NPROC"} == expected


COMMAND = (
    "import os, sys; from jaxrlhf import cli, runtime; runtime._huge_pages_on_request = lambda: {asked};"
    "cli._dispatch = lambda given: print(given, os.environ.get('GLIBC_TUNABLES')); cli.main()"
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_a_command_that_computes_starts_again_with_huge_pages():
    def tell(asked: bool, *given: str, **environment: str) -> str:
        return python(COMMAND.format(asked=asked), *given, **environment).stdout.strip()

    assert tell(True, "ppo", "a b") == "['ppo', 'a b'] glibc.malloc.hugetlb=1"
    assert tell(False, "ppo") == "['ppo'] None"
    assert tell(True, "new", "ppo") == "['new', 'ppo'] None"
    assert tell(True, "ppo", "--help") == "['ppo', '--help'] None"
    assert tell(True, "ppo", GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == "['ppo'] glibc.malloc.hugetlb=0"


@pytest.mark.parametrize(
    ("requested", "backend", "dtype"),
    [("auto", "cpu", "float32"), ("auto", "gpu", "bfloat16"), ("bfloat16", "cpu", "bfloat16")],
)
def test_auto_dtype_by_backend(requested, backend, dtype):
    assert runtime.resolve_dtype(requested, backend) == dtype


@pytest.mark.parametrize(
    ("requested", "backend", "remat"),
    [("auto", "cpu", "full"), ("auto", "gpu", "dots"), ("auto", "tpu", "none"), ("none", "gpu", "none")],
)
def test_auto_remat_by_backend(requested, backend, remat):
    assert runtime.resolve_remat(requested, backend) == remat


@pytest.mark.parametrize(
    "plugins, libtpu, device, expected",
    [
        ([], False, "", False),  # plain jax
        (["xla_cuda13"], False, "", True),
        ([], True, "", True),
        (["xla_cuda13"], True, "dev/nvidiactl", False),
        (["xla_cuda12"], False, "dev/dxg", False),  # WSL
        ([], True, "sys/bus/pci/devices/0/vendor", False),  # a TPU VM
        (["xla_cuda13", "xla_rocm7"], False, "", False),  # another accelerator's plugin, of which we know nothing
    ],
)
def test_compilers_without_an_accelerator_leave_jax_on_the_cpu(
    plugins, libtpu, device, expected, tmp_path, monkeypatch
):
    packages = tmp_path / "packages"
    for name in ["jax_plugins", *(f"jax_plugins/{plugin}" for plugin in plugins), *["libtpu"] * libtpu]:
        (packages / name).mkdir(parents=True)
    file = tmp_path / "root" / (device or "dev/null")
    file.parent.mkdir(parents=True)
    file.write_text("0x1ae0\n")
    monkeypatch.setattr(sys, "path", [str(packages)])
    for name in ("jax_plugins", "libtpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    sys.path_importer_cache.clear()
    assert runtime._only_compilers(tmp_path / "root") is expected


X86 = "processor\t: 0\nmodel name\t: AMD EPYC 7763\nflags\t\t: avx avx2 bmi2\n\nprocessor\t: 1\nmodel name\t: B\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name", "extensions", "bfloat16"),
    [
        (X86, "AMD EPYC 7763", ("AVX2",), False),
        (X86.replace(" bmi2", " avx512f avx512_bf16"), "AMD EPYC 7763", ("AVX2", "AVX-512", "AVX-512 bfloat16"), True),
        (X86.replace(" bmi2", " avx512f amx_bf16"), "AMD EPYC 7763", ("AVX2", "AVX-512", "AMX bfloat16"), True),
        (ARM, "this machine", ("NEON", "SVE", "NEON bfloat16"), True),
        ("", "this machine", (), False),
    ],
)
def test_the_processor_is_told_by_its_instructions(cpuinfo, name, extensions, bfloat16, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, **_: cpuinfo)
    monkeypatch.setattr(platform, "processor", lambda: "this machine")
    monkeypatch.setattr(sys, "platform", "linux")
    found = runtime.processor.__wrapped__()
    assert (found.name, found.extensions, found.multiplies_bfloat16) == (name, extensions, bfloat16)
    assert str(found).startswith(f"{name}, {found.cores} core")


@pytest.mark.parametrize(
    ("extensions", "backend", "dtype", "rows", "left"),
    [
        (("AVX2",), "cpu", "float32", 32, True),
        (("AVX2",), "cpu", "float32", 33, False),
        (("AVX2",), "cpu", "float32", None, False),
        (("AVX2",), "cpu", "bfloat16", 8, False),
        (("AVX2",), "gpu", "float32", 8, False),
        (("AVX2", "AVX-512"), "cpu", "float32", 8, False),
        (("NEON",), "cpu", "float32", 8, False),
    ],
)
def test_weights_are_on_the_left_where_that_was_measured_to_be_faster(
    extensions, backend, dtype, rows, left, monkeypatch
):
    monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))
    assert runtime.weights_left(backend, dtype, rows) is left


@pytest.mark.parametrize(
    ("extensions", "backend", "dtype", "tokens", "kept"),
    [
        (("AVX2",), "cpu", "float32", 1152, True),
        (("AVX2",), "cpu", "float32", 1153, False),
        (("AVX2",), "cpu", "bfloat16", 8, False),
        (("AVX2",), "gpu", "float32", 8, False),
        (("AVX2", "AVX-512"), "cpu", "float32", 8, False),
        (("NEON",), "cpu", "float32", 8, False),
    ],
)
def test_products_are_kept_where_that_was_measured_to_be_faster(extensions, backend, dtype, tokens, kept, monkeypatch):
    monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))
    assert runtime.keeps_products(backend, dtype, tokens, hidden_size=576) is kept


@pytest.mark.parametrize(
    ("extensions", "backend", "dtype", "rows", "apart"),
    [
        (("AVX2", "AVX-512"), "cpu", "float32", 8, True),
        (("AVX2", "AVX-512"), "cpu", "float32", 7, False),
        (("AVX2", "AVX-512"), "cpu", "float32", None, False),
        (("AVX2", "AVX-512"), "cpu", "bfloat16", 8, False),
        (("AVX2", "AVX-512"), "gpu", "float32", 8, False),
        (("AVX2",), "cpu", "float32", 8, False),
        (("NEON",), "cpu", "float32", 8, False),
    ],
)
def test_keys_are_stored_by_column_where_that_was_measured_to_be_faster(
    extensions, backend, dtype, rows, apart, monkeypatch
):
    monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))
    assert runtime.keys_by_column(backend, dtype, rows) is apart


def test_the_processor_of_a_mac_is_told_by_sysctl(monkeypatch):
    said = "machdep.cpu.brand_string: Apple M3\nhw.optional.arm.FEAT_BF16: 1\n"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, **_: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(runtime.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said, ""))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    found = runtime.processor.__wrapped__()
    assert (found.name, found.extensions) == ("Apple M3", ("NEON", "NEON bfloat16")) and found.multiplies_bfloat16
