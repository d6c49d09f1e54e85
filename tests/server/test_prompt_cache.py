"""Kept prompts: by owner, by bytes, the longest ones."""

import numpy as np

from edge_align.server.prompt_cache import PromptCache


def tokens(*parts: tuple[int, int]) -> np.ndarray:
    """Runs of (token, length)."""
    return np.concatenate([np.full(n, token, np.int32) for token, n in parts])


def test_the_prompt_that_shares_most_is_found_among_the_owners_own():
    cache = PromptCache(10_000)
    cache.put("ann", tokens((1, 100), (2, 100)), b"a" * 100)
    cache.put("ann", tokens((1, 150)), b"b" * 100)
    cache.put("bob", tokens((1, 300)), b"c" * 100)
    kept, shared = cache.find("ann", tokens((1, 160)))
    assert (kept.data[:1], shared) == (b"b", 150)
    kept, shared = cache.find("ann", tokens((1, 100), (2, 10)))
    assert (kept.data[:1], shared) == (b"a", 110)
    assert cache.find("eve", tokens((1, 160))) == (None, 0)


def test_the_least_recently_used_goes_first_and_the_bytes_stay_in_bounds():
    cache = PromptCache(250)
    for token in (1, 2):
        cache.put("ann", tokens((token, 100)), bytes(100))
    cache.find("ann", tokens((1, 100)))  # now 2 is the older one
    cache.put("ann", tokens((3, 100)), bytes(100))
    assert cache.bytes == 200 and len(cache) == 2
    assert cache.find("ann", tokens((2, 100)))[1] == 0 and cache.find("ann", tokens((1, 100)))[1] == 100
    cache.put("ann", tokens((4, 100)), bytes(251))  # larger than everything
    assert len(cache) == 2


def test_a_conversation_that_goes_on_replaces_its_beginning():
    cache = PromptCache(1_000)
    cache.put("ann", tokens((1, 100)), bytes(100))
    cache.put("ann", tokens((1, 100), (2, 50)), bytes(150))
    assert (len(cache), cache.bytes) == (1, 150)
    assert cache.covers("ann", tokens((1, 100))) and not cache.covers("ann", tokens((1, 100), (3, 50)))
    assert cache.covers("ann", tokens((9, 10)))  # too short to be worth it
    cache.forget("ann")
    assert cache.bytes == 0
