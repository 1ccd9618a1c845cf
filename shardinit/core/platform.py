"""Machine: what decides which code a compiler writes here, in words that compare.

Bits belong to what computed them, and so does an executable: beside the platform and
the versions, on CPU to the features of the processor, and to the flags that were given
to the compiler.
"""

from __future__ import annotations

import os
import platform
import sys

_FEATURES = ("sse4", "avx", "fma", "f16c", "bmi", "amx", "asimd", "sve")


def processor(platform_name: str) -> tuple[str, ...]:
    """The machine's architecture and, on CPU, the features that decide the code."""
    machine = platform.machine()
    if platform_name != "cpu":
        return (machine,)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            # Linux says "flags" on x86 and "Features" on ARM.
            lines = [x for x in file if x.lower().startswith(("flags", "features"))]
    except OSError:
        lines = []
    features = lines[0].partition(":")[2].split() if lines else []
    return (machine, *sorted(x for x in features if x.startswith(_FEATURES)))


def xla_flags() -> tuple[str, ...]:
    """Flags of the platforms' compilers; not where to write dumps and the like."""
    wanted = ("--xla_cpu_", "--xla_gpu_", "--xla_tpu_", "--xla_allow_")
    flags = os.environ.get("XLA_FLAGS", "").split()
    return tuple(sorted(flag for flag in flags if flag.startswith(wanted)))


def peak_bytes() -> int:
    """The most memory that this process has held so far, in bytes."""
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def with_cpu_devices(flags: str, count: int | None) -> str:
    """XLA's flags with so many simulated CPU devices, or with no number of them."""
    name = "--xla_force_host_platform_device_count"
    kept = [flag for flag in flags.split() if not flag.startswith(name)]
    return " ".join(kept if count is None else [*kept, f"{name}={count}"])
