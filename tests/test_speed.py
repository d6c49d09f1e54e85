"""Paired, interleaved timing: the arithmetic, and that nothing but the clock decides the figures."""

import numpy as np
import pytest

from edge_align.runtime.fake import FakeBackend
from edge_align.speed import (
    at_length,
    interleaved,
    interval,
    measure_latency,
    paired_ratio,
    some_vectors,
    stage_seconds,
)


def test_arms_alternate_their_order_and_the_first_round_is_not_kept():
    said, told = [], []

    def arm(name):
        return lambda: said.append(name) or float(len(said))

    found = interleaved({"a": arm("a"), "b": arm("b")}, 3, tell=told.append)
    assert "".join(said) == "baabbaab"
    assert found == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_a_ratio_is_of_paired_runs():
    """A machine that slows down by a factor of ten leaves the ratio alone."""
    slowing = np.geomspace(1.0, 10.0, 21)
    ratio = paired_ratio(0.9 * slowing, slowing)
    assert (ratio.median, ratio.ci_low, ratio.ci_high) == pytest.approx((0.9, 0.9, 0.9))


def test_the_interval_covers_the_median_of_normal_values_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(300, 25))
    covered = [low <= 0.0 <= high for low, high in map(interval, draws)]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_latency_of_an_engine_runs_each_arm_as_often_and_with_vectors_that_do_not_change_the_answer():
    with FakeBackend() as backend:
        vectors = some_vectors(backend)
        assert not vectors.array[0].any() and 0 < np.abs(vectors.array[1:]).max() < 0.01
        stages = []
        found = measure_latency(backend, runs=2, tokens=8, prompt_tokens=(4, 9), tell=lambda *said: stages.append(said))
        assert [row.prompt_tokens for row in found.first_token] == [4, 9]
        assert found.base_tps > 0 and found.personal_tps > 0 and found.personal_over_base.ci_low > 0
        assert stages[-1] == ("first token", 1.0) and ("decode", 1.0) in stages
        row = at_length(backend, vectors, 5, runs=2)
        assert row.base_sec > 0 and row.per_token.base_sec > 0
        assert row.per_token.ratio.ci_low <= row.per_token.ratio.median <= row.per_token.ratio.ci_high


def test_an_answer_of_one_token_has_no_time_per_token_after_it():
    with FakeBackend() as backend:
        row = at_length(backend, some_vectors(backend), 5, runs=2, tokens=1)
    assert row.base_sec > 0 and row.per_token is None


def test_stages_are_timed_in_their_order_and_after_a_warm_up():
    said = []
    seconds = stage_seconds({"one": lambda: said.append(1), "two": lambda: said.append(2)}, 2, tell=lambda _done: None)
    assert said == [1, 2] * 3 and list(seconds) == ["one", "two"] and min(seconds.values()) >= 0
