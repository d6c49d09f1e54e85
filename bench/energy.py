"""Energy as the machine itself counts it: Linux's powercap zones (RAPL), one per processor package.

The counter is of the whole package, whoever uses it, and readable by root on most systems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    """A package's counter. limit: microjoules at which it begins at 0 again."""

    path: Path
    limit: int

    def read(self) -> int:
        return int((self.path / "energy_uj").read_text())


def zones(folder: Path = POWERCAP) -> list[Zone]:
    """The packages whose counters can be read; none on a machine that does not say."""
    found = []
    for path in sorted(folder.glob("*-rapl:*")):
        if path.name.count(":") == 1:  # a part of a package has a number more
            try:
                zone = Zone(path, int((path / "max_energy_range_uj").read_text()))
                zone.read()
            except (OSError, ValueError):
                continue
            found.append(zone)
    return found


def joules(work: Callable[[], object], counted: list[Zone]) -> float:
    """What the packages used while `work` ran; right for work that takes less than a counter's turn (minutes)."""
    before = [zone.read() for zone in counted]
    work()
    spent = [(zone.read() - start) % (zone.limit + 1) for zone, start in zip(counted, before, strict=True)]
    return sum(spent) / 1e6
