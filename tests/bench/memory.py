"""The memory of this process as Linux counts it, bytes."""

import re
from pathlib import Path


def resident_bytes() -> int:
    """What lies in memory now (VmRSS)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that lay in memory at once since the process began, or since `reset_peak` (VmHWM)."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Lets the peak begin anew at what lies in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return 1024 * int(found[1])
