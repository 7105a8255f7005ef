"""What must be decided before jax starts. Imports no jax; whatever the environment already says stays."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Literal


def configure() -> None:
    """Set the environment that jax and transformers read when they are imported: compilation cache and quiet logs."""
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(_cache_directory()),
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's own log: errors only
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)


def resolve_dtype(requested: Literal["auto", "float32", "bfloat16"], backend: str) -> Literal["float32", "bfloat16"]:
    """`requested`, where auto means float32 on a CPU, whose bfloat16 products are slow, and bfloat16 elsewhere."""
    if requested != "auto":
        return requested
    return "float32" if backend == "cpu" else "bfloat16"


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
