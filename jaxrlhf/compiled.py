"""What XLA compiles, kept on disk: the second run of a config starts without compiling; and what compiling leaves."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from pathlib import Path


def keep() -> None:
    """What XLA compiles is kept for later processes, under the user's cache; JAX's own variables come first.

    Several processes may use it: JAX locks it. JAX does not tell CPUs apart, which a shared home can have several of.
    """
    try:
        flags = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features"))][:1]
    except OSError:
        flags = [platform.processor()]
    machine = hashlib.sha256("".join([platform.machine(), *flags]).encode()).hexdigest()[:12]
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        (place := home / "jaxrlhf" / "compiled" / machine).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(place))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))
    # Smaller programs are compiled about as fast as they are read.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")


def tidy() -> None:
    """Memory that compiling has left with the allocator goes back to the system: hundreds of megabytes, under glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library, which has its own ways
        return
