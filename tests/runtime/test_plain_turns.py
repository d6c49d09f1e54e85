"""A base that was never taught to take turns: no template, none of ChatML's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from edge_align.bases import find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.records import Message
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.template import PLAIN
from edge_align_export.passes import open_passes
from edge_align_export.tokenizer_json import read_tokenizer
from scripts.tiny_models import write_gguf, write_hf

NEWLINE = 3 + 10  # byte 10, after three control tokens
PROMPT = (Message("user", "Why?\nOr not?"),)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("plain") / "tiny.gguf", "llama", chat=False)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[LlamaCppBackend]:
    with LlamaCppBackend.open(path, config=RuntimeConfig(n_threads=1, n_ctx=512)) as backend:
        yield backend


def test_a_question_is_plain_text(plain: LlamaCppBackend) -> None:
    assert plain.detokenize(plain.render(PROMPT)) == "Question:\nWhy?\nOr not?\n\nAnswer:\n"


def test_an_answer_ends_with_its_line(plain: LlamaCppBackend) -> None:
    tokens = plain.render(PROMPT)
    reasons = []
    for seed in range(12):
        sampling = SamplingConfig(max_tokens=200, seed=seed, temperature=1.0, top_k=300, top_p=1.0)
        chunks = list(plain.generate(tokens, vectors=None, sampling=sampling))
        assert "\n" not in "".join(chunk.text for chunk in chunks)
        reasons.append(chunks[-1].finish_reason)
    assert "stop" in reasons
    rows = plain.generate_batch([tokens] * 8, vectors=None, sampling=SamplingConfig(max_tokens=200, temperature=1.0))
    assert not any(NEWLINE in row.tokens for row in rows)


def test_a_pack_samples_answers_of_one_line(path: Path, plain: LlamaCppBackend) -> None:
    assert plain.ends == (NEWLINE, 0)
    passes = open_passes(find_base(str(path)), plain, runtime=RuntimeConfig(n_threads=1, n_ctx=512))
    sampling = SamplingConfig(max_tokens=200, temperature=1.0, top_k=300, top_p=1.0)
    made = passes.sample([plain.render(PROMPT)] * 12, sampling=sampling)
    assert min(map(len, made)) < 200 and not any(NEWLINE in answer for answer in made)


def test_an_export_takes_it_along(path: Path, tmp_path: Path) -> None:
    made = read_tokenizer(path)
    assert made.template == PLAIN and set(made.ends) == {0, NEWLINE}
    folder = write_hf(tmp_path / "hf")
    chat = read_tokenizer(folder)
    assert chat.template != PLAIN
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|im_start|>", "<unused0>").replace("chat_template", "other")
        (folder / name).write_text(text)
    without = read_tokenizer(folder)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = {token for token in range(library.get_vocab_size()) if "\n" in library.decode([token])}
    assert without.template == PLAIN and set(without.ends) == {*chat.ends, *lines}
