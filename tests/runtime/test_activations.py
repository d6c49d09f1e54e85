from collections.abc import Iterator

import numpy as np
import pytest

from edge_align.bases import BaseModel
from edge_align.config import RuntimeConfig
from edge_align.errors import ContextOverflow, InputError, SessionClosed
from edge_align.runtime.activations import ActivationReader
from edge_align.runtime.positions import PositionSums


@pytest.fixture(scope="module")
def reader(base: BaseModel) -> Iterator[ActivationReader]:
    with ActivationReader.open(base.path, config=RuntimeConfig(n_threads=1, n_ctx=512)) as reader:
        yield reader


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(100, 40_000, size).tolist() for size in (12, 30, 7)]


SPANS = [(4, 12), (0, 30), (6, 7)]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_stopping_early_changes_nothing_and_neither_does_what_came_before(
    reader: ActivationReader, sequences: list[list[int]]
) -> None:
    early = reader.mean_hidden(sequences, SPANS, [0, 1])
    deeper = reader.mean_hidden(sequences, SPANS, [1, 5, 0])
    np.testing.assert_array_equal(early, deeper[:, [2, 0]])
    np.testing.assert_array_equal(reader.mean_hidden(sequences, SPANS, [0, 1]), early)
    assert early.shape == (3, 2, reader.d_model) and early.dtype == np.float32


def test_means_are_means_of_the_hidden_states_of_each_sequence_alone(
    reader: ActivationReader, sequences: list[list[int]]
) -> None:
    """Together and alone round differently (int8 activations), so up to a small share of the norm."""
    found = PositionSums(30, 3, reader.d_model)
    together = reader.mean_hidden(sequences, SPANS, [0, 1, 4], positions=found)
    assert found.counts.tolist() == [3] + [2] * 7 + [1] * 22
    lengths = np.array([end - start for start, end in SPANS])
    np.testing.assert_allclose(found.sums.sum(0), (together * lengths[:, None, None]).sum(0), rtol=1e-3, atol=1e-2)
    for sequence, (start, end), row in zip(sequences, SPANS, together, strict=True):
        alone = reader.hidden(sequence, [0, 1, 4])
        assert alone.shape == (3, len(sequence), reader.d_model)
        assert relative(row, alone[:, start:end].mean(axis=1)) < 0.01


def test_blocks_agree_with_the_torch_reference(base: BaseModel, reader: ActivationReader) -> None:
    """The independent source: the GGUF's dequantised weights in PyTorch. llama.cpp rounds activations to int8."""
    torch_ref = pytest.importorskip("edge_align.runtime.torch_ref")
    import torch

    tokens = np.random.default_rng(1).integers(100, 40_000, 20).tolist()
    model = torch_ref.LlamaReference(base.path, n_layer=2)
    with torch.inference_mode():
        _, kept = model.hidden(torch.tensor([tokens]), layers=[0, 1])
    ours = reader.hidden(tokens, [0, 1])
    for layer in (0, 1):
        assert relative(ours[layer], kept[layer][0].numpy()) < 0.03
    assert relative(ours[0], ours[1]) > 0.1  # the tolerance tells neighbouring blocks apart


def test_the_last_block_gives_every_position(reader: ActivationReader) -> None:
    tokens = np.random.default_rng(2).integers(100, 40_000, 100).tolist()  # more than one part
    last = reader.hidden(tokens, [reader.n_layer - 1, 0])
    assert last.shape == (2, 100, reader.d_model)
    assert relative(last[1], reader.hidden(tokens, [0])[0]) < 0.01
    assert (np.abs(last[0]).sum(axis=1) > 0).all()


def test_misuse_raises_our_errors(base: BaseModel, reader: ActivationReader) -> None:
    with pytest.raises(InputError, match="0 to 29"):
        reader.hidden([5], [30])
    with pytest.raises(InputError, match="span 2:2"):
        reader.mean_hidden([[5, 6, 7]], [(2, 2)], [0])
    with pytest.raises(ContextOverflow, match="513"):
        reader.hidden([5] * 513, [0])
    other = ActivationReader.open(base.path, config=RuntimeConfig(n_threads=1, n_ctx=64))
    other.close()
    other.close()
    with pytest.raises(SessionClosed):
        other.hidden([5], [0])
