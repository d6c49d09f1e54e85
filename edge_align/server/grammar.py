"""From a JSON schema to the grammar that llama.cpp samples by, through llama-cpp-python's own converter."""

from __future__ import annotations

import functools

from edge_align.errors import InputError

GRAMMAR_LIMIT = 256 << 10  # characters

_CHARACTER = r'[^"\\] | "\\" ("'[:-1]
_JSON_CHARACTER = r'[^"\\\x7F\x00-\x1F] | "\\" ("'[:-1]
"""A character of a string: the converter's rule lets line breaks through, JSON does not (llama.cpp's own has this)."""


@functools.lru_cache(maxsize=32)
def grammar_of(schema: str) -> str:
    """GBNF of the JSON values that fit `schema` (JSON text). Raises InputError for one it does not understand.

    References outside the schema are not fetched.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar: str = json_schema_to_gbnf(schema)
    except Exception as error:  # the converter asserts, indexes and recurses its way through what it is given
        raise InputError(
            f"the schema cannot be made into a grammar ({type(error).__name__}); use types, properties, required, "
            "items, enum, const, anyOf and local $ref"
        ) from None
    grammar = grammar.replace(_CHARACTER, _JSON_CHARACTER)
    if len(grammar) > GRAMMAR_LIMIT:
        raise InputError("the grammar of the schema is too large; simplify the schema")
    return grammar
