"""Who shares a batch: only rows that are, to the bit, what they are alone."""

import numpy as np
import pytest

from edge_align.runtime.onnx_rows import OnnxRows, same_in_any_batch


class Decoder:
    """Logits are the token and its position; `drift` is added where several rows are computed at once."""

    rows, room = 3, 8

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.sizes = np.float32(drift), []

    def run(self, tokens, held, *, steering, wanted, row):
        self.sizes.append(len(tokens))
        found = np.stack([tokens[:, 0], held], 1).astype(np.float32)[:, None]
        return found + self.drift * (len(tokens) > 1)


@pytest.mark.parametrize(("drift", "same"), [(0.0, True), (1e-6, False)])
def test_one_bit_is_a_difference(drift, same):
    assert same_in_any_batch(Decoder(drift)) is same


@pytest.mark.parametrize(("together", "sizes"), [(True, [3]), (False, [1, 1, 1])])
def test_rows_that_asked_are_computed_at_once_or_one_by_one(together, sizes):
    decoder = Decoder()
    rows = OnnxRows(decoder, together=together)
    taken = [rows.take() for _ in range(3)]
    for i, row in enumerate(taken):
        row.ask(10 + i, i, None)
    assert [row.shared for row in taken] == [together] * 3
    assert [row.logits().tolist() for row in taken] == [[10, 0], [11, 1], [12, 2]]
    assert decoder.sizes == sizes and rows.held.tolist() == [1, 2, 3]
