"""The machine that figures are taken on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from artifacts.manifest import tool_version


def hardware() -> str:
    """The machine and the library that figures were taken with, for the head of a report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_cpu_name(), f"{cores} cores", f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Releases that figures were taken with."""
    return {"kvgauge": tool_version(), "python": platform.python_version(), "transformers": version("transformers")}


def _cpu_name() -> str:
    """The name Linux gives the processor, elsewhere what Python knows of it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
