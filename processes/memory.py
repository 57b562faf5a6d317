"""Exact inference needs memory with the square of the number of rows: whether there is enough, before it begins."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
_BYTES = {torch.float64: 8, torch.float32: 4}


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can be had on a device without swapping; None where the system doesn't tell.

    Of main memory, the kernel's own estimate (``MemAvailable``, which counts caches that can be dropped) and at most what a
    control group leaves, as in containers; elsewhere the free pages.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps for later is free for PyTorch.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [value for value in (_of_the_system(), _of_the_control_group()) if value is not None]
    return min(found, default=None)


def check_memory(
    name: str,
    num_rows: int,
    num_matrices: float,
    instead: str,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Raise if matrices of n rows and n columns won't fit.

    Args:
        name: of the model that needs them.
        num_rows: n.
        num_matrices: how many are there at once, at the peak.
        instead: which model to use.
        dtype: of the matrices.
        device: where they are.

    Raises:
        MemoryError: if they take more than what is available; it says how much that is, and what to use instead.
    """
    needed = num_matrices * num_rows**2 * _BYTES.get(dtype, 8)
    available = available_memory(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{name}: {num_rows} rows need about {_readable(needed)} for {num_matrices:.0f} matrices of that size squared; "
            f"{_readable(available)} are available; use {instead}"
        )


def _of_the_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_the_control_group() -> int | None:
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Cached files count as used, and are dropped when memory is wanted.
    return None if limit == "max" else max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))


def _readable(size: float) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size:.0f} B"
