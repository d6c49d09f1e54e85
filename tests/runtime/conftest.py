from collections.abc import Iterator

import numpy as np
import pytest

from edge_align.bases import BaseModel, find_base
from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable
from edge_align.records import SteeringVectors

ONE_THREAD = RuntimeConfig(n_threads=1, n_ctx=512)  # spinning threads of a busy machine would make these tests slow


@pytest.fixture(scope="session")
def base() -> BaseModel:
    try:
        return find_base()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vectors(base: BaseModel) -> SteeringVectors:
    """Random ones, strong enough to change the very first tokens."""
    array = np.random.default_rng(1).normal(size=(base.n_layer, base.d_model)) * 0.5
    array[0] = 0
    return SteeringVectors(array)


@pytest.fixture(scope="session")
def backend(base: BaseModel) -> "Iterator[object]":
    from edge_align.runtime.llamacpp import LlamaCppBackend

    with LlamaCppBackend.open(base.path, config=ONE_THREAD) as backend:
        yield backend
