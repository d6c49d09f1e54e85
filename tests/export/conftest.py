"""What several tests of the export share."""

import pytest
from reference import naive_llama as naive

from edge_align.runtime.torch_ref import LlamaReference


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> LlamaReference:
    """The naive model's weights in the PyTorch reference."""
    path = tmp_path_factory.mktemp("naive") / "tiny.gguf"
    naive.write_tiny(path)
    return LlamaReference(path)
