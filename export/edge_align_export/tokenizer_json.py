"""The tokenizer of an export: copied from a Hugging Face folder, or rebuilt from a GGUF's vocabulary and checked.

Byte-level BPE vocabularies and SentencePiece's are rebuilt. The result must give llama.cpp's own tokens on PROBES and
on the prompts that packs are made with, else it is refused.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edge_align.errors import BackendUnavailable, ModelLoadError
from edge_align.files import parse_json_object, shown
from edge_align.gguf_header import read_header
from edge_align.runtime.llama_native import BYTE, CONTROL, NativeModel, UNKNOWN, USER_DEFINED
from edge_align.runtime.template import CHATML_START, ends_line, fallback, PLAIN
from edge_align.runtime.tokenizer import Tokenizer
from edge_align.simulation.prompts import prompts

SPACE = "\u2581"  # SentencePiece's

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_DIGIT, _BY_THREE = [r"\p{N}", _GPT2], [_TIKTOKEN % "{1,3}"]
PRE_TOKENIZERS: dict[str, list[str]] = {
    # tokenizer.ggml.pre -> the regular expressions that split a text, one after the other
    "gpt-2": [_GPT2],
    "smollm": _BY_DIGIT,
    "refact": _BY_DIGIT,  # Granite's
    "starcoder": _BY_DIGIT,
    "qwen2": [_TIKTOKEN % ""],
    "llama-bpe": _BY_THREE,
    "smaug-bpe": _BY_THREE,  # SmolLM3's
}
WHOLE_FIRST = ("llama-bpe",)  # a piece that is a token is that token, whether or not merges lead there
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>", "<|end|>")

PROBES = (
    "Hello, world!  It's 2024 and we'll have 1234567 reasons -- won't we?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? Año, naïve, œuvre.",
    "日本語のテキスト、한국어 텍스트, русский текст, ελληνικά, العربية, हिन्दी, ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00a0\u2003\u200b\ufeff tabs\t\tand\n\n\nnew lines \r\n and   spaces   ",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-10], \"b\": f'{x!r:>10}'}  # comment\n\n\tif x<=3: pass",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_sta rt|> </s> [INST] <unk>",
    " leading and trailing ",
    "I'M SHOUTING, THEY'RE 'quoted' AND I'd've… “curly” — ½ ² ① Ⅷ ٣٤٥",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\x\\y 10,000.00 $5 50% #1 @you \x00\x01\x7f",
    "a" * 100 + " " * 50 + "\n" * 10 + "!?" * 20,
)


@dataclass(frozen=True, slots=True)
class ExportedTokenizer:
    """What travels along: the text of tokenizer.json, the chat template, and the tokens the engine must know."""

    document: str
    template: str
    bos: int | None
    adds_bos: bool
    ends: tuple[int, ...]  # the first one is what templates call eos_token


def read_tokenizer(source: Path) -> ExportedTokenizer:
    """The tokenizer of a GGUF or a Hugging Face folder.

    Raises ModelLoadError (missing, unreadable), BackendUnavailable (a kind that cannot be rebuilt exactly).
    """
    return _from_folder(source) if source.is_dir() else _from_gguf(source)


# -- GGUF ----------------------------------------------------------------------------------------------------------
def _from_gguf(path: Path) -> ExportedTokenizer:
    metadata = read_header(path).metadata
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "llama" and (kind != "gpt2" or pre not in PRE_TOKENIZERS):
        raise BackendUnavailable(
            f"the tokenizer of {shown(path)} ({kind}, {pre}) cannot be rebuilt exactly; "
            "export from the model's Hugging Face folder instead"
        )
    with closing(NativeModel(path)) as model:
        tokens = [Token(*model.raw(i)) for i in range(model.n_vocab)]
        if kind == "llama":
            parts = _sentencepiece(tokens, prefix=metadata.get("tokenizer.ggml.add_space_prefix") is not False)
        else:
            parts = _byte_level(_merges(path), str(pre))
        document = json.dumps(_document(tokens, parts), ensure_ascii=False)
        _check_against(model, document, path)
        return ExportedTokenizer(document, model.chat_template, model.bos, model.adds_bos, model.ends)


class Token(NamedTuple):
    """A vocabulary's entry; flags as in `runtime.llama_native`."""

    text: str
    score: float
    flags: int


def _document(tokens: list[Token], parts: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with the `model` and the steps around it that `parts` says."""
    outside = [(i, token) for i, token in enumerate(tokens) if token.flags & (UNKNOWN | CONTROL | USER_DEFINED)]
    added = [
        {
            "id": i,
            "content": token.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(token.flags & (UNKNOWN | CONTROL)),
        }
        for i, token in outside
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "vocab": {token.text: i for i, token in enumerate(tokens)},
    }
    steps = {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **(steps | parts),
        "model": model | parts["model"],
    }


def _merges(path: Path) -> list[str]:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.merges")
    if field is None:
        raise ModelLoadError(f"{shown(path)} has no merges")
    return [str(merge) for merge in field.contents()]


def _byte_level(merges: list[str], pre: str) -> dict[str, Any]:
    """BPE of bytes, as GPT-2 spells them, in pieces that patterns split off one after the other."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PRE_TOKENIZERS[pre]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": level,
        "model": {"byte_fallback": False, "ignore_merges": pre in WHOLE_FIRST, "merges": merges},
    }


def _sentencepiece(tokens: list[Token], *, prefix: bool) -> dict[str, Any]:
    """SentencePiece's BPE: no merges are listed, of two neighbours those go together that make the likeliest token.

    prefix: a space goes before every text.
    """
    scores = {token.text: token.score for token in tokens if not token.flags & (UNKNOWN | CONTROL | BYTE)}
    merges: list[tuple[str, str]] = []
    for text in sorted(scores, key=scores.__getitem__, reverse=True):
        halves = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]
        merges += sorted(halves, key=lambda pair: (scores[pair[0]], scores[pair[1]]), reverse=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"byte_fallback": True, "ignore_merges": False, "merges": merges},
    }


def _check_against(model: NativeModel, document: str, path: Path) -> None:
    """Refuse a tokenizer that splits any text otherwise than llama.cpp does."""
    from tokenizers import Tokenizer as Library

    rebuilt = Library.from_str(document)
    for text in (*PROBES, *prompts("pack")):
        for special in (True, False):
            rebuilt.encode_special_tokens = not special
            if rebuilt.encode(text, add_special_tokens=False).ids != model.tokenize(text, special=special):
                raise BackendUnavailable(
                    f"the tokenizer of {shown(path)} cannot be rebuilt exactly (it differs on {ascii(text[:24])}); "
                    "export from the model's Hugging Face folder instead"
                )


# -- Hugging Face --------------------------------------------------------------------------------------------------
def _from_folder(folder: Path) -> ExportedTokenizer:
    from tokenizers import Tokenizer as Library

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{shown(folder)} has no tokenizer.json; save the tokenizer in its fast form first")
    document = path.read_text(encoding="utf-8")
    try:
        library = Library.from_str(document)
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(
            f"{shown(path)} is not a usable tokenizer: {' '.join(str(error).split())[:120]}"
        ) from error
    config = _optional_json(folder / "tokenizer_config.json")
    ids = [_optional_json(folder / name) for name in ("generation_config.json", "config.json")]
    names = [config.get("eos_token"), *ENDS]
    ends = [token for found in ids for token in _listed(found.get("eos_token_id"))]
    ends += [library.token_to_id(name) for name in map(_content, names) if name is not None]
    bos = library.token_to_id(_content(config.get("bos_token")) or "")
    adds_bos = bos is not None and library.encode("a").ids[:1] == [bos]
    known = dict.fromkeys(token for token in ends if token is not None)
    template = _template(folder, config) or fallback(library.token_to_id(CHATML_START) is not None)
    if template == PLAIN:
        tokenizer = Tokenizer(path)
        known |= dict.fromkeys(i for i in range(tokenizer.n_vocab) if ends_line(tokenizer.piece(i)))
    return ExportedTokenizer(document, template, bos, adds_bos, tuple(known))


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return parse_json_object(path.read_bytes(), shown(path)) if path.is_file() else {}


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [*(value or ())]


def _content(value: Any) -> str | None:
    """A token's text; configs spell it as a string or as an object."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None
