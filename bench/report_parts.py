"""What the pages of `report.py` share: the committed results, and words for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MODELS = ROOT / "models"

Result = dict[str, Any]


class NoResult(LookupError):
    """Nothing of this kind has been measured yet."""


class Results:
    """The documents of bench/results."""

    def __init__(self, folder: Path = RESULTS) -> None:
        found = [json.loads(path.read_text()) | {"file": path.name} for path in folder.glob("*.json")]
        self._all: list[Result] = sorted(found, key=lambda result: (result["date"], result["file"]))

    def newest(self, script: str, *, where: Callable[[Result], bool] = lambda _: True, shipped: bool = True) -> Result:
        """Of a base that a pack is shipped for, or of any other. Raises NoResult when there is none."""
        return self.newest_first(script, where=where, shipped=shipped)[0]

    def by_processor(self, script: str, *, where: Callable[[Result], bool] = lambda _: True) -> list[Result]:
        """The newest on a processor that multiplies bfloat16, and on one that does not; those that there are."""
        found = []
        for bf16 in (True, False):
            with suppress(NoResult):
                found.append(self.newest(script, where=lambda r, b=bf16: where(r) and r["machine"]["bf16"] == b))
        return found

    def newest_first(
        self, script: str, *, where: Callable[[Result], bool] = lambda _: True, shipped: bool = True
    ) -> list[Result]:
        """As `newest`, all of them."""
        found = [
            result
            for result in reversed(self._all)
            if result["script"] == script
            and _of_shipped_base(result) == shipped
            and not result["options"].get("quick")
            and where(result)
        ]
        if not found:
            raise NoResult(f"no result of {script}.py under {RESULTS}")
        return found


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def ratio(found: Result, digits: int = 3) -> str:
    """A median with its 95 % interval."""
    return f"{found['median']:.{digits}f} ({found['ci_low']:.{digits}f} to {found['ci_high']:.{digits}f})"


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def earlier(result: Result) -> str:
    """A remark where the pack has been replaced since."""
    known = {None, *_shipped("tensors_sha256")}
    return "" if result.get("pack_hash") in known or not _of_shipped_base(result) else " (by an earlier pack)"


def _of_shipped_base(result: Result) -> bool:
    """Is it of a base that a pack is shipped for?"""
    return result.get("base_hash") in {None, *_shipped("base_hash")}


@cache
def _shipped(field: str) -> frozenset[str]:
    """A field of the shipped packs' manifests."""
    return frozenset(json.loads(path.read_text())[field] for path in MODELS.glob("*/manifest.json"))


def with_bf16(result: Result) -> str:
    """Does its processor multiply bfloat16?"""
    return f"{'with' if result['machine']['bf16'] else 'without'} bfloat16"


def source(result: Result) -> str:
    """The command, the machine and the file of a result."""
    hidden = ("quick", "seed", "threads")
    options = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in result["options"].items()
        if key not in hidden and value not in (None, False)
    ]
    machine = result["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return (
        f"`python bench/{result['script']}.py {' '.join(options)}` at {result['commit']}, {result['date'][:10]}, "
        f"{cores} of {machine['cpu']} {with_bf16(result)} instructions: "
        f"[{result['file']}](../bench/results/{result['file']}){earlier(result)}"
    )
