"""Mean states less what the position in an answer alone explains."""

from __future__ import annotations

import numpy as np

from edge_align.runtime.positions import centred, PositionSums


def test_by_hand():
    """Answers 1, 3 and 5, 7: position means 3 and 5, so the first is at -2 and the second at +2."""
    sums = PositionSums(4, 1, 1)
    sums.add(0, 0, np.array([[1.0], [3.0]]))
    sums.add(0, 0, np.array([[5.0], [7.0]]))
    assert sums.counts.tolist() == [2, 2, 0, 0] and sums.sums[:, 0, 0].tolist() == [6, 10, 0, 0]
    found = centred(np.array([[[2.0]], [[6.0]]]), np.array([2, 2]), sums)
    assert found.dtype == np.float32 and found[:, 0, 0].tolist() == [-2.0, 2.0]


def test_states_that_depend_on_position_alone_vanish_whatever_the_length():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(9, 2, 3))
    lengths = np.array([1, 9, 4, 2])
    sums = PositionSums(12, 2, 3)
    for n in lengths:
        for layer in (0, 1):
            sums.add(layer, 0, states[:n, layer])
    means = np.stack([states[:n].mean(0) for n in lengths])
    np.testing.assert_allclose(centred(means, lengths, sums), 0, atol=1e-6)
    longer = lengths + np.array([0, 1, 0, 0])  # a token that was drawn and never passed through
    assert np.isfinite(centred(means, longer, sums)).all()
