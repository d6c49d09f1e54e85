"""Rotary settings mean what transformers takes them for, in the spelling of transformers 4 and of 5."""

from typing import Any

import numpy as np
import pytest

from edge_align.errors import InputError
from edge_align_export.rope import FULL, rope_of, SLIDING

D_HEAD = 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def by_transformers(base: float, scaling: dict[str, Any] | None) -> np.ndarray:
    """Rotary frequencies of a Llama with these settings, (D_HEAD / 2,)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = None if scaling is None else dict(scaling)  # transformers 5 writes into it
    config = LlamaConfig(hidden_size=2 * D_HEAD, num_attention_heads=2, rope_theta=base, rope_scaling=own)
    return np.asarray(LlamaRotaryEmbedding(config).inv_freq.numpy())


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_both_spellings_mean_what_transformers_computes(base: float, scaling: dict[str, Any] | None) -> None:
    older = {"rope_theta": base, "rope_scaling": scaling}
    newer = {"rope_parameters": {"rope_theta": base, "rope_type": "default"} | (scaling or {})}
    for config in (older, newer):
        assert np.allclose(rope_of(config).frequencies(D_HEAD), by_transformers(base, scaling), rtol=1e-6, atol=0)


def test_layers_of_two_types_have_a_base_each() -> None:
    """Gemma 3: scaling is for the full layers alone."""
    older = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR}
    newer = {
        "rope_parameters": {
            FULL: {"rope_theta": 1e6, **LINEAR},
            SLIDING: {"rope_theta": 2e4, "rope_type": "default"},
        }
    }
    for config in (older, newer):
        assert np.allclose(rope_of(config).frequencies(D_HEAD), by_transformers(1e6, LINEAR), rtol=1e-6, atol=0)
        assert np.allclose(rope_of(config, SLIDING).frequencies(D_HEAD), by_transformers(2e4, None), rtol=1e-6, atol=0)


def test_the_usual_bases_stand_where_none_is_given() -> None:
    assert rope_of({}).base == 10000.0
    assert rope_of({}, usual=1e6).base == 1e6
    assert rope_of({"rope_parameters": {FULL: {"rope_type": "default"}}}, SLIDING, usual=5.0).base == 5.0


def test_older_settings_of_scaling_win_over_newer_ones() -> None:
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_scaling": LINEAR}
    assert (rope_of(config).scaling, rope_of(config).base) == ("linear", 7e4)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rope_scaling": "linear"}, "no object"),
        ({"rope_parameters": [1]}, "no object"),
        ({"rope_parameters": {FULL: "default"}}, "no object"),
        ({"rope_theta": "big"}, "rope_theta: 'big'"),
        ({"rope_theta": float("inf")}, "rope_theta: inf"),
        ({"rope_theta": -1}, "rope_theta: -1"),
        ({"rope_scaling": {"type": "linear"}}, "factor: None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "same low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ],
)
def test_what_is_no_setting_is_named(config: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        rope_of(config).frequencies(D_HEAD)
