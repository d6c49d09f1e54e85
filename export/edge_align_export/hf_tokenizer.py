"""A byte-level BPE tokenizer.json as GGUF metadata, and the proof that llama.cpp splits text with it in the same way.

A GGUF does not hold the rules by which text is split before merging, only the name of a set of rules that llama.cpp
knows. Which one is meant cannot be read off reliably, so it is tried: the first name under which llama.cpp gives the
same tokens for a difficult text. None is an error, never a guess.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import BackendUnavailable, InputError, ModelLoadError
from edge_align.files import shown
from edge_align.runtime.llama_native import NativeModel
from edge_align_export.hf_folder import HFFolder, OTHER_CONVERTER

RULES = [
    *("llama-bpe", "smaug-bpe", "qwen2", "smollm", "refact", "gpt-2", "gpt-4o", "deepseek-llm"),
    *("deepseek-coder", "starcoder", "falcon", "tekken", "olmo", "dbrx"),
]
"""Names of `tokenizer.ggml.pre`, the commonest first."""

DIFFICULT = (
    "Hello there, it's 7 o'clock; they'RE late & we'LL wait.\n\n\tdef f(x):\n        return x**2  # 12345 + 678,90\r\n"
    "   three   spaces\t\ttabs \n \n  Ünïcödé naïve façade, русский текст, 中文字符, 日本語, عربي, हिन्दी "
    "👩\u200d💻🚀 (emoji) ... ?!?! ---- ==== //// '' \"\" `` 3.14159 1,000,000 2024-01-31 ①② ½ x² A1B2C3 CamelCase"
)


class Vocabulary:
    """Token texts and types of a folder, ready to be written with any GGUFWriter. Raises InputError."""

    def __init__(self, folder: HFFolder) -> None:
        from gguf import SpecialVocab

        self._folder = folder
        model = folder.tokenizer.get("model", {})
        if model.get("type") != "BPE" or not _is_byte_level(folder.tokenizer):
            raise InputError(
                f"the tokenizer in {shown(folder.path)} is not a byte-level BPE, the kind converted here; "
                f"{OTHER_CONVERTER}"
            )
        self.tokens, self.types = _tokens(folder)
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it tells what it adds, on stderr
        self._special = SpecialVocab(folder.path, load_merges=True, n_vocab=len(self.tokens))
        if isinstance(
            self._special.chat_template, list
        ):  # several, by name; the one without a purpose of its own counts
            named = {item["name"]: item["template"] for item in self._special.chat_template}
            self._special.chat_template = named.get("default")
        self.rules = self._choose()

    def write(self, writer: Any, *, rules: str | None = None) -> None:
        """Add the tokenizer's metadata to a GGUFWriter."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rules or self.rules)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        self._special.add_to_gguf(writer, quiet=True)
        if "bos" not in self._special.add_special_token:  # else llama.cpp decides by the kind of tokenizer
            writer.add_add_bos_token(False)

    def _choose(self) -> str:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackendUnavailable('converting needs tokenizers; run: pip install "edge-align[export]"') from error
        try:
            tokenizer = Tokenizer.from_file(str(self._folder.path / "tokenizer.json"))
        except Exception as error:  # whatever a parser raises, the file is no tokenizer
            raise InputError(f"{shown(self._folder.path / 'tokenizer.json')} is no tokenizer: {error}") from error
        wanted = tokenizer.encode(DIFFICULT, add_special_tokens=False).ids
        for rules in RULES:
            if self._tokens_of(rules) == wanted:
                return rules
        raise InputError(
            f"llama.cpp splits text otherwise than the tokenizer in {shown(self._folder.path)}, under each of "
            f"{len(RULES)} sets of rules tried; {OTHER_CONVERTER}"
        )

    def _tokens_of(self, rules: str) -> list[int] | None:
        """DIFFICULT as llama.cpp tokenises it under these rules; None where it does not take them."""
        from gguf import GGUFWriter

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            writer = GGUFWriter(path, "llama")
            writer.add_block_count(1)
            writer.add_embedding_length(1)
            self.write(writer, rules=rules)
            writer.add_tensor("token_embd.weight", np.zeros((1, 1), np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            try:
                with closing(NativeModel(path, vocab_only=True)) as model:
                    return model.tokenize(DIFFICULT, special=False)
            except ModelLoadError:
                return None


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Does its decoder (or one of a sequence) turn byte characters back into bytes?"""
    decoder = tokenizer.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *(decoder.get("decoders") or [])])


def _tokens(folder: HFFolder) -> tuple[list[str], list[int]]:
    """Texts and GGUF types by id, as many as the embedding has rows. Raises InputError for ids beyond it."""
    from gguf import TokenType

    n_vocab = folder.size("vocab_size")
    texts = {int(number): str(text) for text, number in folder.tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in folder.tokenizer.get("added_tokens") or []:
        number = int(token["id"])
        texts[number] = str(token["content"])
        kinds[number] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
    if max(texts) >= n_vocab:
        raise InputError(f"the tokenizer in {shown(folder.path)} has {max(texts) + 1} tokens, the model {n_vocab}")
    unused = [number for number in range(n_vocab) if number not in texts]
    texts |= {number: f"[PAD{number}]" for number in unused}
    kinds |= dict.fromkeys(unused, TokenType.UNUSED)
    return [texts[number] for number in range(n_vocab)], [int(kinds[number]) for number in range(n_vocab)]
