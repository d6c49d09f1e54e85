"""ONNX made from a GGUF: the graph is what transformers and llama.cpp compute, its tokens are llama.cpp's."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable
from edge_align.features import NativeAnswerEncoder, OnnxAnswerEncoder
from edge_align.runtime.llama_native import NativeModel
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.onnx import OnnxBackend
from edge_align.runtime.tokenizer import Tokenizer
from edge_align_export.gguf_file import export_gguf
from edge_align_export.onnx_export import export_onnx
from edge_align_export.tokenizer_json import PRE_TOKENIZERS, read_tokenizer
from scripts import tiny_models
from scripts.tiny_models import D_HEAD, write_gguf, write_hf

ONE = RuntimeConfig(n_threads=1, n_ctx=256)
TOKENS = np.random.default_rng(0).integers(3, 262, 40).tolist()


def logits_of(backend: OnnxBackend | LlamaCppBackend) -> np.ndarray:
    """After each of TOKENS but the last, (T - 1, n_vocab)."""
    with backend:
        (logits,) = backend.score(TOKENS[:1], [TOKENS[1:]], vectors=None)
        return np.array(logits)


def by_the_graph(source: Path, out: Path) -> np.ndarray:
    export_onnx(source, out, precision="fp32")
    return logits_of(OnnxBackend.open(out, config=ONE))


def by_transformers(folder: Path, **where: str) -> np.ndarray:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **where)
    if hasattr(config, "query_pre_attn_scalar"):  # no GGUF has it; assumed to be 256, the size of real heads
        config.query_pre_attn_scalar = D_HEAD
    if config.model_type == "gemma2":  # not read from the file: those of real models
        config.attn_logit_softcapping, config.final_logit_softcapping = tiny_models.CAPS
    options: dict[str, Any] = {"config": config, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **where, **options).float().eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0, :-1].numpy())


@pytest.mark.parametrize("architecture", ["llama", "smollm3", "granite", "qwen2", "gemma", "gemma2", "gemma3"])
def test_the_graph_of_a_gguf_is_what_transformers_and_llama_cpp_compute(architecture: str, tmp_path: Path) -> None:
    """Past Gemma's windows. llama.cpp keeps keys and values in 16 bits, and its gelu is a table of 16-bit numbers."""
    source = write_gguf(tmp_path / "tiny.gguf", architecture)
    got = by_the_graph(source, tmp_path / "out")
    if architecture not in ("smollm3", "granite", "gemma"):  # those it reads from folders alone
        assert np.abs(got - by_transformers(tmp_path, gguf_file=source.name)).max() <= 1e-3
    assert np.abs(got - logits_of(LlamaCppBackend.open(source, config=ONE))).max() <= 0.02


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gemma3"])
def test_answers_are_read_as_from_the_gguf_so_that_its_pack_fits(architecture: str, tmp_path: Path) -> None:
    """A pack's readout takes features of either; llama.cpp's are of its 16-bit cache and gelu."""
    source = write_gguf(tmp_path / "tiny.gguf", architecture)
    export_onnx(source, tmp_path / "out", precision="fp32")
    answers = [[5, 6, 7], TOKENS]
    encoders = (NativeAnswerEncoder(source), OnnxAnswerEncoder(tmp_path / "out", n_threads=1))
    there, here = (encoder.encode(answers) for encoder in encoders)
    encoders[0].close()
    assert np.abs(here).max() > 1 and np.abs(there - here).max() <= 5e-3


def test_linear_scaling_of_positions_survives_both_exports(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", "llama", rope_scaling={"rope_type": "linear", "factor": 3.0})
    export_gguf(folder, tmp_path / "gguf", quants=["F32"])
    (source,) = (tmp_path / "gguf").glob("*.gguf")
    assert np.abs(by_the_graph(source, tmp_path / "out") - by_transformers(folder)).max() <= 1e-3


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_is_rebuilt_without_its_merges(
    prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any text in the alphabet splits as llama.cpp splits it: merges, spaces, bytes, tokens of their own, control."""
    add = tiny_models._add_sentencepiece
    monkeypatch.setattr(tiny_models, "_add_sentencepiece", lambda writer, **given: add(writer, **given, prefix=prefix))
    source = write_gguf(tmp_path / "tiny.gguf", "gemma3")
    made = read_tokenizer(source)
    (tmp_path / "tokenizer.json").write_text(made.document, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    pieces = [
        "the",
        " th",
        "a",
        "ng",
        "qu",
        " ",
        "  ",
        "\n\n",
        "\n",
        "aaaa",
        "ä",
        "中",
        "<b>",
        "</s>",
        "<|im_end|>",
        "<unk>",
        "\u2581",
    ]
    with closing(NativeModel(source)) as model:
        assert (made.bos, made.adds_bos, made.ends) == (model.bos, model.adds_bos, model.ends)

        @given(st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=12).map("".join), st.booleans())
        def splits_alike(text: str, special: bool) -> None:
            assert tokenizer.tokenize(text, special=special) == model.tokenize(text, special=special)

        splits_alike()
        assert [tokenizer.piece(i) for i in range(model.n_vocab)] == [model.piece(i) for i in range(model.n_vocab)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe_is_rebuilt(pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens that no merges lead to, which llama.cpp takes whole or never, as the kind may be."""
    add, whole = tiny_models._add_byte_level, ("hello", "\u0120thanks", "12", "123", "1234")
    monkeypatch.setattr(
        tiny_models, "_add_byte_level", lambda writer, **given: add(writer, **given | {"pre": pre, "whole": whole})
    )
    source = write_gguf(tmp_path / "tiny.gguf", "llama")
    (tmp_path / "tokenizer.json").write_text(read_tokenizer(source).document, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    pieces = ["hello", " thanks", "the", "1", "12", "1234", " ", "\n", "'s", "!", "ä", "<|im_end|>"]
    with closing(NativeModel(source)) as model:

        @given(st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=12).map("".join), st.booleans())
        def splits_alike(text: str, special: bool) -> None:
            assert tokenizer.tokenize(text, special=special) == model.tokenize(text, special=special)

        splits_alike()


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = tiny_models._add_byte_level
    monkeypatch.setattr(
        tiny_models, "_add_byte_level", lambda writer, **given: add(writer, **given | {"pre": "falcon"})
    )
    with pytest.raises(BackendUnavailable, match="falcon\\) cannot be rebuilt exactly"):
        read_tokenizer(write_gguf(tmp_path / "tiny.gguf", "llama"))
