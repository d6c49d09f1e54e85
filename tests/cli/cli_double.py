"""What stands in for the engine in tests of the command line, and a report to show."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from edge_align.errors import InputError
from edge_align.home import Home
from edge_align.records import FeedbackRow, GenerationChunk, GenerationStats, join_chunks
from edge_align.store import FeedbackLog


class DoubleAssistant:
    """Stands for the engine: says which of base and profile answers, to what and with which seed.

    Verdicts go to the real log. `learnt` counts calls of learn.
    """

    profiles: dict[str, int] = {}
    current: str | None = None
    same_answers = False
    during_answer = staticmethod(lambda: None)
    opened: list[dict[str, object]] = []

    def __init__(self, home: Home, profile: str | None) -> None:
        self.home = home
        self.base = SimpleNamespace(id="double", path=Path("double.gguf"), hash="sha256:00")
        self.closed = False
        self.set_profile(profile)

    @classmethod
    def open(cls, *, model=None, profile=None, use_profile=True, home, runtime, engine=None):
        cls.opened.append({"model": model, "runtime": runtime, "engine": engine})
        return cls(home, (profile or cls.current) if use_profile else None)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.closed = True

    def set_profile(self, name):
        if name is not None and name not in self.profiles:
            raise InputError(f"unknown profile {name}")
        self.profile = name and SimpleNamespace(
            name=name, version=self.profiles[name], scale=2.0, predicted_kl=0.2, note=None
        )

    def stream(self, prompt, *, sampling, strength=1.0, steered=True, cancelled=None):
        who = self.profile.name if self.profile and steered else "base"
        seed = "" if self.same_answers else f" with seed {sampling.seed}"
        for part in (f"{who} answers ", f"'{prompt[-1].content}'", seed):
            if cancelled is not None and cancelled():
                yield self.last("cancelled")
                return
            yield GenerationChunk(text=part, tokens=(1,))
            type(self).during_answer()
        yield self.last("stop")

    @staticmethod
    def last(reason):
        stats = GenerationStats(
            prompt_tokens=7,
            cached_tokens=0,
            completion_tokens=3,
            ttft_sec=0.25,
            generation_sec=1.0,
            prompt_tps=28.0,
            generation_tps=2.0,
        )
        return GenerationChunk(text="", finish_reason=reason, stats=stats)

    def answer(self, prompt, **options):
        return join_chunks([*self.stream(prompt, **options)])

    def _log(self, row):
        with FeedbackLog(self.home) as log:
            log.append(self.profile.name if self.profile else "default", [row])

    def rate(self, prompt, completion, up):
        self._log(FeedbackRow(prompt, completion=completion, label=up, origin="thumb"))

    def prefer(self, prompt, chosen, rejected, *, origin):
        self._log(FeedbackRow(prompt, chosen=chosen, rejected=rejected, origin=origin))

    def learn(self, *, progress=None):
        return Report(profile=self.profile.name if self.profile else "default")


REPORT = {
    "profile": "default",
    "version": 3,
    "model": "double",
    "state": "learnt",
    "rows": {
        "read": 12,
        "used": 10,
        "duplicates": 1,
        "dropped": [{"file": "a.jsonl", "line": 4, "reason": "chosen is empty"}] * 2,
        "dropped_more": 0,
        "logged": 11,
        "trained_on": 11,
    },
    "pairs": {"preference": 9, "edit": 1},
    "ratings": 1,
    "heldout": {"accuracy": 0.871, "ci_low": 0.79, "ci_high": 0.92, "p": 0.005, "n": 10},
    "reliability": 0.8,
    "depends_on_prompt": False,
    "outside_support": 0.02,
    "scale": 2.312,
    "predicted_kl": 0.25,
    "nll_ratio": 1.12,
    "collision_ratio": 1.08,
    "stages_sec": {"read": 0.1, "encode": 1.5, "fit": 0.25},
    "profile_bytes": 1234,
    "activated": True,
    "reason": None,
}


@dataclass
class Report:
    profile: str = "default"

    def to_dict(self):
        return REPORT | {"profile": self.profile}
