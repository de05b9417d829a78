"""What else decides how fast a machine is at the moment: power, heat, other work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def conditions() -> dict[str, Any]:
    """``power`` (mains, battery or None), ``low_power_mode``, ``thermal`` (nominal, limited or None), ``load``.

    None stands for what the system does not tell.
    """
    if sys.platform == "darwin":
        power, mode, heat = (_output("pmset", "-g", what) for what in ("batt", "custom", "therm"))
        state = {"power": power_in(power), "low_power_mode": low_power_in(mode), "thermal": thermal_in(heat)}
    else:
        state = linux_conditions(Path("/sys"))
    return {**state, "load": round(os.getloadavg()[0], 2)}


def power_in(text: str) -> str | None:
    """Where macOS takes its power from, of ``pmset -g batt``."""
    match = re.search(r"drawing from '(AC|Battery) Power'", text)
    return None if match is None else {"AC": "mains", "Battery": "battery"}[match[1]]


def low_power_in(text: str) -> bool | None:
    """Whether low power mode is on in the present profile, of ``pmset -g custom``."""
    match = re.search(r"lowpowermode\s+(\d)", text)
    return None if match is None else match[1] != "0"


def thermal_in(text: str) -> str | None:
    """Whether macOS holds the processor back for heat, of ``pmset -g therm``."""
    limits = [int(value) for value in re.findall(r"(?:CPU_Speed_Limit|CPU_Scheduler_Limit)\s*=\s*(\d+)", text)]
    if limits:
        return "nominal" if min(limits) >= 100 else f"limited to {min(limits)} %"
    return "nominal" if "No thermal warning level has been recorded" in text else None


def linux_conditions(root: Path) -> dict[str, Any]:
    """The same from the files below ``/sys``, as far as they are there (a server or container has none)."""
    online = [_number(file) for file in sorted(root.glob("class/power_supply/*/online"))]
    throttled = [_number(file) for file in root.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    counted = [value for value in throttled if value is not None]
    return {
        "power": None if not online else "mains" if any(online) else "battery",
        "low_power_mode": None,
        "thermal": f"throttled {sum(counted)} times since start" if counted else None,
    }


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
