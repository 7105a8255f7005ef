"""What must be decided before jax starts, in one place. Imports no jax; whatever the environment already says stays."""

import hashlib
import math
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Literal, NamedTuple


class Setting(NamedTuple):
    """An environment variable that is read when `read` happens: an import, or the first use of a device."""

    name: str
    value: str
    read: Literal["jax", "devices", "transformers"]


OTHERS = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "HF_HUB_OFFLINE", "GLIBC_TUNABLES")
"""What is left alone here and still worth showing where someone has set it."""

HUGE_PAGES = "glibc.malloc.hugetlb=1"
_set_here: set[str] = set()


def configure() -> None:
    """Set the environment that jax, XLA and transformers read when they start, but for what is set already.

    Every command calls it first, and so does the first use of a name of the package that needs jax. Warns once, in a
    line, about what comes too late because jax has used a device: it is set nevertheless, for processes that this one
    starts.
    """
    late = []
    for setting in defaults():
        if setting.name not in os.environ:
            os.environ[setting.name] = setting.value
            _set_here.add(setting.name)
            if setting.read == "transformers":
                continue
            if _devices_started():
                late.append(f"{setting.name}={setting.value}")
            elif setting.read == "jax" and "jax" in sys.modules:
                value = setting.value if setting.name.endswith("_DIR") else float(setting.value)
                sys.modules["jax"].config.update(setting.name.lower(), value)
    if late:
        warnings.warn(
            f"jax had started before jaxrlhf.runtime.configure() was called, so {len(late)} setting"
            f"{'s have' if len(late) > 1 else ' has'} no effect: {' '.join(late)}. Call it, or import jaxrlhf's names, "
            "before anything uses jax, or set them in the environment that python starts in",
            stacklevel=2,
        )


def defaults() -> list[Setting]:
    """What `configure` sets where the environment says nothing."""
    settings = [
        Setting("JAX_COMPILATION_CACHE_DIR", str(_cache_directory()), "jax"),
        # Small programs too: a run has dozens of them, and reading one takes milliseconds.
        Setting("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0", "jax"),
        Setting("TF_CPP_MIN_LOG_LEVEL", "2", "devices"),  # XLA's own log: errors only
        Setting("TRANSFORMERS_VERBOSITY", "error", "transformers"),
        Setting("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1", "transformers"),
    ]
    quota = cpu_quota()
    if quota is not None and quota < _processors():
        # XLA counts the processors it may run on; more threads than the container's share of time would be throttled.
        settings.append(Setting("PJRT_NPROC", str(quota), "devices"))
    if Path("/proc/driver/nvidia/version").exists() and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # jax alone takes 0.75 of a card. It refuses to start when this name and the older one are both set.
        settings.append(Setting("XLA_CLIENT_MEM_FRACTION", "0.9", "devices"))
    return settings


def report() -> list[str]:
    """The settings that are in force and where each comes from, a line each."""
    names = [*(setting.name for setting in defaults()), *OTHERS]
    ours = _set_here | ({"GLIBC_TUNABLES"} if os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES else set())
    return [
        f"{name}={os.environ[name]} ({'set by jaxrlhf' if name in ours else 'from the environment'})"
        for name in dict.fromkeys(names)
        if name in os.environ
    ]


def restart_with_huge_pages() -> None:
    """Start this process again, once, with glibc asking for huge pages; it reads that only when a process starts.

    XLA gives large buffers back after each step and takes them again in the next, and every small page of them is a
    fault of its own. Nothing happens where the kernel needs no asking, where glibc cannot, or where GLIBC_TUNABLES says
    something already (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps small pages).
    """
    libc, version = platform.libc_ver()
    old = libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 35)
    if sys.platform != "linux" or old or "GLIBC_TUNABLES" in os.environ or not _huge_pages_on_request():
        return
    environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _huge_pages_on_request(file: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    try:
        return "[madvise]" in file.read_text(encoding="ascii")
    except OSError:
        return False


def resolve_dtype(requested: Literal["auto", "float32", "bfloat16"], backend: str) -> Literal["float32", "bfloat16"]:
    """`requested`, where auto means float32 on a CPU, few of which multiply bfloat16 faster, and bfloat16 elsewhere."""
    if requested != "auto":
        return requested
    return "float32" if backend == "cpu" else "bfloat16"


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The processors' worth of time that a container may use, rounded up; None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / file).read_text(encoding="ascii") for file in files).split()
            return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
        except (OSError, ValueError):  # not this version of cgroups; or "max", which is no limit
            continue
    return None


def _processors() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _devices_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")  # no public name says it without starting them
    return bridge is not None and bool(getattr(bridge, "backends_are_initialized", lambda: True)())


def resolve_remat(requested: Literal["auto", "none", "full", "dots"], backend: str) -> Literal["none", "full", "dots"]:
    """`requested`, where auto means full on a CPU (as fast in float32, faster in bfloat16) and none elsewhere."""
    if requested != "auto":
        return requested
    return "full" if backend == "cpu" else "none"


def resolve_attention(
    requested: Literal["auto", "plain", "cudnn"], backend: str, dtype: str
) -> Literal["plain", "cudnn"]:
    """`requested`, where auto means cudnn for bfloat16 on an NVIDIA card, if a trial agrees."""
    if requested != "auto":
        return requested
    return "cudnn" if backend in ("gpu", "cuda") and dtype == "bfloat16" else "plain"


def logits_alive(backend: str) -> int:
    """How many logits to make at once: on a CPU what its cache holds (4 MB), else enough to keep the device busy."""
    return 2**20 if backend == "cpu" else 2**25


def _cache_directory() -> Path:
    """The user's cache folder for compiled programs, one per kind of CPU: what is compiled for one may stop another."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    digest = hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
    return Path(cache) / "jaxrlhf" / f"xla-{digest}"
