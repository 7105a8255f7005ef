"""Environment settings for jax, XLA and transformers, and the values of `auto` options by backend.

Imports no jax. Variables that are already set in the environment are never changed.
"""

import contextlib
import functools
import hashlib
import importlib.util
import math
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Literal, NamedTuple


class Setting(NamedTuple):
    """An environment variable and when it is read: at an import, or at the first use of a device."""

    name: str
    value: str
    read: Literal["jax", "devices", "transformers"]


class Processor(NamedTuple):
    """The processor of this machine."""

    name: str
    cores: int
    """Those that this process may run on."""
    extensions: tuple[str, ...]
    """Its instructions for matrix products, of EXTENSIONS."""
    flags: str
    """All instructions, as the system names them; "" if it does not."""

    @property
    def has_avx2_alone(self) -> bool:
        """True if it has AVX2 without AVX-512."""
        return "AVX2" in self.extensions and "AVX-512" not in self.extensions

    @property
    def multiplies_bfloat16(self) -> bool:
        """True if it has instructions for products of bfloat16. Without, they are slower than those of float32: 100
        GFLOP/s where float32 has 170, on an EPYC with AVX2 (docs/performance.md)."""
        return any("bfloat16" in name for name in self.extensions)

    def __str__(self) -> str:
        cores = f"{self.name}, {self.cores} core{'s' * (self.cores != 1)}"
        return f"{cores}, with {', '.join(self.extensions)}" if self.extensions else cores


EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_bf16": "AMX bfloat16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "NEON bfloat16",
    "hw.optional.arm.FEAT_BF16": "NEON bfloat16",
}
"""Names of instructions for matrix products, by the flag of Linux (x86, then ARM) or the key of macOS."""
OTHERS = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "HF_HUB_OFFLINE", "GLIBC_TUNABLES")
"""Variables that are not set here but reported if they are set."""

LEFT_ROWS = 32
"""Rows of a device up to which `weights_left` gains."""
KEPT_TOKENS = 2
"""Tokens of a micro-batch up to which `keeps_products` is true, as a multiple of the model's hidden size."""
COLUMN_ROWS = 8
"""Rows of a device from which on `keys_by_column` gains."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_set_by_us: set[str] = set()


def configure() -> None:
    """Set the `defaults` that the environment does not define.

    Called by every command, and at the first use of a name of the package that needs jax. Warns once if settings have
    no effect because jax has already used a device; they are still set, for child processes.
    """
    late = []
    for setting in defaults():
        if setting.name in os.environ:
            continue
        os.environ[setting.name] = setting.value
        _set_by_us.add(setting.name)
        if setting.read == "transformers":
            continue
        if _devices_started():
            late.append(f"{setting.name}={setting.value}")
        elif setting.read == "jax" and "jax" in sys.modules:
            value = float(setting.value) if setting.name.endswith("_SECS") else setting.value
            sys.modules["jax"].config.update(setting.name.lower(), value)
    if late:
        warnings.warn(
            f"jax had started before jaxrlhf.runtime.configure() was called, so {len(late)} setting"
            f"{'s have' if len(late) > 1 else ' has'} no effect: {' '.join(late)}. Call it, or import jaxrlhf's names, "
            "before anything uses jax, or set these variables in the environment of the process",
            stacklevel=2,
        )


def defaults() -> list[Setting]:
    """Settings that `configure` applies."""
    settings = [
        Setting("JAX_COMPILATION_CACHE_DIR", str(_programs_directory()), "jax"),
        # cache small programs too: a run has dozens of them, and loading one takes milliseconds
        Setting("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0", "jax"),
        Setting("TF_CPP_MIN_LOG_LEVEL", "2", "devices"),  # XLA's own log: errors only
        Setting("TRANSFORMERS_VERBOSITY", "error", "transformers"),
        Setting("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1", "transformers"),
    ]
    quota = cpu_quota()
    if quota is not None and quota < _processors():
        # XLA starts a thread per processor; those beyond the container's CPU quota would be throttled
        settings.append(Setting("PJRT_NPROC", str(quota), "devices"))
    if _only_compilers():
        # jax would look for a GPU or TPU, and print that it failed
        settings.append(Setting("JAX_PLATFORMS", "cpu", "jax"))
    if Path("/proc/driver/nvidia/version").exists() and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # jax's default is 0.75; it refuses to start if this name and the older one are both set
        settings.append(Setting("XLA_CLIENT_MEM_FRACTION", "0.9", "devices"))
    return settings


def report() -> list[str]:
    """Settings in force and their origin, one per line."""
    names = [*(setting.name for setting in defaults()), *OTHERS]
    ours = _set_by_us | ({"GLIBC_TUNABLES"} if os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES else set())
    return [
        f"{name}={os.environ[name]} ({'set by jaxrlhf' if name in ours else 'from the environment'})"
        for name in dict.fromkeys(names)
        if name in os.environ
    ]


def restart_with_huge_pages() -> None:
    """Restart this process once with huge pages enabled in glibc, which reads the setting only at process start.

    XLA frees large buffers after each step and allocates them again in the next, with a page fault per page. Does
    nothing if the kernel does not need the request, glibc does not support it, or GLIBC_TUNABLES is set already
    (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps small pages).
    """
    libc, version = platform.libc_ver()
    unsupported = libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 35)
    if sys.platform != "linux" or unsupported or "GLIBC_TUNABLES" in os.environ or not _huge_pages_on_request():
        return
    environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPU quota of the container in processors, rounded up; None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / file).read_text(encoding="ascii") for file in files).split()
            return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
        except (OSError, ValueError):  # the other version of cgroups, or "max": no limit
            continue
    return None


def version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def resolve_dtype(requested: Literal["auto", "float32", "bfloat16"], backend: str) -> Literal["float32", "bfloat16"]:
    """Resolve auto: float32 on a CPU, as few CPUs multiply bfloat16 faster, else bfloat16."""
    auto = "float32" if backend == "cpu" else "bfloat16"
    return auto if requested == "auto" else requested


def resolve_remat(requested: Literal["auto", "none", "full", "dots"], backend: str) -> Literal["none", "full", "dots"]:
    """Resolve auto: full on a CPU, for about half the memory of none in about the same time; dots on a GPU, where an
    update launches a fifth fewer kernels than with none, and keeps half as much; else none (docs/performance.md). Where
    `keeps_products`, supervised training takes dots in place of full."""
    auto = "full" if backend == "cpu" else "dots" if backend in ("gpu", "cuda") else "none"
    return auto if requested == "auto" else requested


def keeps_products(backend: str, dtype: str, tokens: int, hidden_size: int) -> bool:
    """True where a supervised step on micro-batches of so many tokens is faster if it keeps the results of products
    (dots) than if it computes them again (full): in float32 on a processor with AVX2 and without AVX-512
    (docs/performance.md).

    False for more tokens than twice the hidden size. The results kept for a token are about (parameters of the
    layers) / hidden_size numbers, so at most twice the memory of the parameters is kept.
    """
    few = tokens <= KEPT_TOKENS * hidden_size
    return backend == "cpu" and dtype == "float32" and few and processor().has_avx2_alone


def resolve_attention(
    requested: Literal["auto", "plain", "cudnn"], backend: str, dtype: str
) -> Literal["plain", "cudnn"]:
    """Resolve auto: cudnn for bfloat16 on an NVIDIA GPU (the caller still tries it out), else plain."""
    auto = "cudnn" if backend in ("gpu", "cuda") and dtype == "bfloat16" else "plain"
    return auto if requested == "auto" else requested


def weights_left(backend: str, dtype: str, rows: int | None) -> bool:
    """True where a product of so many rows (None: not known) is faster with the weight as the left operand: up to 32 in
    float32 on a processor with AVX2 and without AVX-512 (docs/performance.md)."""
    few = rows is not None and rows <= LEFT_ROWS
    return backend == "cpu" and dtype == "float32" and few and processor().has_avx2_alone


def keys_by_column(backend: str, dtype: str, rows: int | None) -> bool:
    """True where attention of so many rows (None: not known) over a cache is faster with keys [H, S] in place of [S, H]
    for a head: of 8 or more in float32 on a processor with AVX-512 (docs/performance.md)."""
    many = rows is not None and rows >= COLUMN_ROWS
    return backend == "cpu" and dtype == "float32" and many and "AVX-512" in processor().extensions


def logits_alive(backend: str) -> int:
    """Number of logits to compute at a time: on a CPU what fits in its cache (4 MB), else enough to keep it busy."""
    return 2**20 if backend == "cpu" else 2**25


def flops_of_compiling(backend: str) -> float:
    """FLOPs that a device computes in about the time that it takes to compile the programs of an update: ten seconds on
    a CPU at 100 GFLOP/s, a minute on an accelerator at 100 TFLOP/s."""
    return 1e12 if backend == "cpu" else 6e15


def _processors() -> int:
    """Number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _devices_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")  # no public function tells without starting them
    return bridge is not None and bool(getattr(bridge, "backends_are_initialized", lambda: True)())


def _only_compilers(root: Path = Path("/")) -> bool:
    """Return True if jax's plugins for GPUs or TPUs are installed, but no such device is there: they serve to compile
    (extras plan-gpu and plan-tpu)."""
    spec = importlib.util.find_spec("jax_plugins")
    plugins = {
        file.name for place in (spec and spec.submodule_search_locations) or () for file in Path(place).iterdir()
    }
    if not plugins <= {"xla_cuda12", "xla_cuda13"} or not (plugins or importlib.util.find_spec("libtpu")):
        return False
    nvidia = any((root / file).exists() for file in ("proc/driver/nvidia", "dev/nvidiactl", "dev/dxg"))
    with contextlib.suppress(OSError):
        vendors = {file.read_text(encoding="ascii").strip() for file in (root / "sys/bus/pci/devices").glob("*/vendor")}
        return not nvidia and "0x1ae0" not in vendors  # Google's, as jax recognises a TPU
    return False


def _huge_pages_on_request(file: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    try:
        return "[madvise]" in file.read_text(encoding="ascii")
    except OSError:
        return False


def cache_directory() -> Path:
    """Folder of what commands keep from one to the next: $XDG_CACHE_HOME/jaxrlhf, by default ~/.cache/jaxrlhf."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxrlhf")


@functools.cache
def processor() -> Processor:
    """The processor of this machine, from /proc/cpuinfo or, on macOS, sysctl."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        name, flags = _of_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), name)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            keys = ["machdep.cpu.brand_string", "hw.optional.arm.FEAT_BF16"]
            found = subprocess.run(["sysctl", *keys], capture_output=True, text=True, check=False).stdout
            values = dict(line.split(": ", 1) for line in found.splitlines() if ": " in line)
            name = values.get(keys[0], name)
            on = [key for key, value in values.items() if value == "1"]
            flags = " ".join((["asimd"] if platform.machine() == "arm64" else []) + on)
    known = set(flags.split())
    extensions = tuple(text for flag, text in EXTENSIONS.items() if flag in known)
    return Processor(name, _processors(), extensions, flags)


def _of_cpuinfo(text: str, name: str) -> tuple[str, str]:
    """(name, flags) of the first processor in a /proc/cpuinfo; `name` if it has none, as on ARM."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    return values.get("model name", name), values.get("flags") or values.get("Features", "")


def _programs_directory() -> Path:
    """Cache folder of compiled programs, one per CPU type: a program for one may crash on another."""
    kind = f"{platform.machine()} {processor().flags}"
    return cache_directory() / f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
