"""Sampling chains of llama.cpp: what may be drawn, and how."""

from __future__ import annotations

from typing import Any

from edge_align.config import SamplingConfig
from edge_align.errors import InputError
from edge_align.runtime.llama_native import NativeModel
from edge_align.runtime.sampling import GREEDY_BELOW

PENALTY_TOKENS = 1024  # newest tokens of an answer that presence and frequency penalties look at


class Sampler:
    """A native sampler chain: bias, penalties, grammar, then top-k, top-p, temperature, draw; greedy at temperature 0.

    The penalties look at the answer, not at the prompt. Raises InputError for a grammar that llama.cpp does not read.
    """

    def __init__(self, model: NativeModel, sampling: SamplingConfig, seed: int) -> None:
        C = self.C = model.C
        constraints = _constraints(model, sampling)  # first: it may raise
        self.chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for part in constraints:
            C.llama_sampler_chain_add(self.chain, part)
        if sampling.temperature < GREEDY_BELOW:
            parts = [C.llama_sampler_init_greedy()]
        else:
            parts = [
                C.llama_sampler_init_top_k(min(sampling.top_k, model.n_vocab)),
                C.llama_sampler_init_top_p(sampling.top_p, 1),
                C.llama_sampler_init_temp(sampling.temperature),
                C.llama_sampler_init_dist(seed & 0xFFFFFFFF),
            ]
        for part in parts:
            C.llama_sampler_chain_add(self.chain, part)

    def close(self) -> None:
        chain, self.chain = self.chain, None
        if chain:
            self.C.llama_sampler_free(chain)


def _constraints(model: NativeModel, sampling: SamplingConfig) -> list[Any]:
    """The samplers that change logits before anything is cut off; usually none."""
    C, parts = model.C, []
    if sampling.grammar is not None:
        grammar = C.llama_sampler_init_grammar(model.vocab, sampling.grammar.encode(), b"root")
        if not grammar:
            raise InputError("llama.cpp cannot read the grammar; simplify the schema")
        parts.append(grammar)
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = (model.n_vocab, PENALTY_TOKENS, 1.0, sampling.frequency_penalty, sampling.presence_penalty)
        parts.insert(0, C.llama_sampler_init_penalties(*penalties))
    if sampling.logit_bias:
        known = [(token, bias) for token, bias in sampling.logit_bias if token < model.n_vocab]
        biases = (C.llama_logit_bias * len(known))(*known)
        parts.insert(0, C.llama_sampler_init_logit_bias(model.n_vocab, len(known), biases))
    return parts
