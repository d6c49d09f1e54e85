"""Counters for /metrics, named as llama-server names them where it has the like."""

from __future__ import annotations

import threading
from collections import defaultdict

from edge_align.server.decoder import Decoded

_HELP = {
    "prompt_tokens_total": ("counter", "Prompt tokens prefilled."),
    "prompt_seconds_total": ("counter", "Time to the first token, summed."),
    "tokens_predicted_total": ("counter", "Tokens decoded."),
    "tokens_predicted_seconds_total": ("counter", "Time of decoding after the first token, summed."),
    "cached_tokens_total": ("counter", "Prompt tokens taken from a cache."),
    "requests_total": ("counter", "Requests that were queued."),
    "answers_total": ("counter", "Answers that ended."),
    "answers_cancelled_total": ("counter", "Answers whose client went away."),
    "feedback_rows_total": ("counter", "Verdicts logged."),
    "refits_total": ("counter", "Profiles learnt anew."),
    "requests_processing": ("gauge", "Answers being decoded."),
    "requests_deferred": ("gauge", "Answers waiting."),
    "prompt_cache_bytes": ("gauge", "Memory of cached prompts beside the contexts."),
}


class Metrics:
    """Counters of this process."""

    def __init__(self) -> None:
        self._values: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._values[f"{name}_total"] += by

    def answered(self, event: Decoded) -> None:
        """Count an answer by its last chunk."""
        stats = event.chunk.stats
        with self._lock:
            self._values["answers_total"] += 1
            self._values["answers_cancelled_total"] += event.chunk.finish_reason == "cancelled"
            if stats is not None:
                self._values["prompt_tokens_total"] += stats.prompt_tokens - stats.cached_tokens
                self._values["cached_tokens_total"] += stats.cached_tokens
                self._values["tokens_predicted_total"] += stats.completion_tokens
                self._values["prompt_seconds_total"] += stats.ttft_sec
                self._values["tokens_predicted_seconds_total"] += stats.generation_sec

    def exposition(self, gauges: dict[str, int]) -> str:
        """Prometheus text format 0.0.4."""
        with self._lock:
            values = {**self._values, **gauges}
        lines = []
        for name, (kind, text) in _HELP.items():
            full = f"edge_align:{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {values.get(name, 0):.12g}"]
        return "\n".join(lines) + "\n"
