"""What people would use instead of a profile, timed beside it: part of `bench/latency.py`.

llama-cpp-python's own class on the unsteered base; a LoRA adapter of llama.cpp (rank 8 on every matrix of every block;
what its numbers are does not matter to speed); the preference in the system prompt, told or shown by three pairs.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from arms import shown
from common import Bench, progress, ROOT

from edge_align.config import SamplingConfig
from edge_align.errors import ModelLoadError
from edge_align.records import join_chunks, Message, PreferencePair, Prompt, SteeringVectors, user_prompt
from edge_align.runtime.llama_native import model_params, n_cores, NativeContext, NativeModel
from edge_align.runtime.llama_sampler import Sampler
from edge_align.speed import interleaved, paired_ratio, PROMPT

RANK = 8
TOLD = "You are a helpful assistant. The user likes a careful answer."
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Timed = tuple[float, float]  # seconds to the first token of a prompt of which nothing is cached; tokens per second then


def instead(bench: Bench, vectors: SteeringVectors) -> dict[str, Any]:
    """Each arm's first token and speed, medians, and their paired ratios to those of a profile."""
    args, backend = bench.args, bench.backend
    sampling = SamplingConfig(max_tokens=args.tokens, temperature=0.0)
    plain = backend.render(user_prompt(PROMPT))
    told, examples = (backend.render(asked(system)) for system in (TOLD, three_pairs()))

    def ours(tokens: list[int], steered: SteeringVectors | None) -> Timed:
        backend.forget_prompt()
        stats = join_chunks(list(backend.generate(tokens, vectors=steered, sampling=sampling))).stats
        assert stats is not None
        return stats.ttft_sec, stats.generation_tps

    with tempfile.TemporaryDirectory() as folder, high_level(bench) as theirs:
        adapter = Path(folder) / "adapter.gguf"
        size = write_adapter(bench.base.path, adapter)
        with lora_context(bench, adapter) as context:
            arms: dict[str, Callable[[], Timed]] = {
                "profile": lambda: ours(plain, vectors),
                "base": lambda: ours(plain, None),
                "llama-cpp-python's class, base": lambda: theirs(plain, args.tokens),
                f"LoRA adapter, rank {RANK}": lambda: bare(context, plain, sampling),
                "written preference": lambda: ours(told, None),
                "three pairs in the prompt": lambda: ours(examples, None),
            }
            with progress("instead of a profile", 100) as tell:
                # `interleaved` keeps whatever an arm returns
                found: Any = interleaved(arms, args.arm_runs, tell=lambda done: tell(round(100 * done)))  # type: ignore
    rows = {}
    for name, values in found.items():
        first, speed = ([value[i] for value in values] for i in (0, 1))
        rows[name] = {
            "first_token_sec": median(first),
            "tokens_per_sec": median(speed),
            "first_token_over_profile": asdict(paired_ratio(first, [value[0] for value in found["profile"]])),
            "speed_over_profile": asdict(paired_ratio(speed, [value[1] for value in found["profile"]])),
        }
    counts = {"question": len(plain), "written preference": len(told), "three pairs in the prompt": len(examples)}
    return {"runs": args.arm_runs, "tokens": args.tokens, "prompt_tokens": counts, "adapter_bytes": size, "arms": rows}


def asked(system: str) -> Prompt:
    return (Message("system", system), *user_prompt(PROMPT))


def three_pairs() -> str:
    """The first three of the example feedback."""
    lines = (ROOT / "examples" / "feedback.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    return shown([PreferencePair(user_prompt(row["prompt"]), row["chosen"], row["rejected"]) for row in rows])


@contextmanager
def high_level(bench: Bench) -> Iterator[Callable[[list[int], int], Timed]]:
    """Greedy decoding by `llama_cpp.Llama`, as its users call it."""
    import llama_cpp

    usual, given = llama_cpp.llama_cpp.llama_model_default_params, model_params()
    llama_cpp.llama_cpp.llama_model_default_params = lambda: given  # their crash on AMX is not what is timed
    try:
        llm = llama_cpp.Llama(
            str(bench.base.path),
            n_ctx=bench.runtime.n_ctx,
            n_threads=bench.runtime.n_threads or n_cores(),
            n_threads_batch=bench.runtime.n_threads or n_cores(),
            n_gpu_layers=bench.runtime.n_gpu_layers,
            flash_attn=True,  # as ours
            verbose=False,
        )
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = usual

    def run(tokens: list[int], n: int) -> Timed:
        llm.reset()
        times, start = [], time.perf_counter()
        for token in llm.generate(tokens, temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            if token == llm.token_eos() or len(times) >= n:
                break
        return times[0] - start, (len(times) - 1) / (times[-1] - times[0])

    with closing(llm):
        yield run


@contextmanager
def lora_context(bench: Bench, adapter: Path) -> Iterator[NativeContext]:
    """A context on a model of its own, with the adapter on."""
    runtime = bench.runtime
    with closing(NativeModel(bench.base.path, n_gpu_layers=runtime.n_gpu_layers)) as model:
        C = model.C
        loaded = C.llama_adapter_lora_init(model.pointer, str(adapter).encode())
        if not loaded:
            raise ModelLoadError("llama.cpp does not load the adapter")
        size = {"n_ctx": runtime.n_ctx, "n_batch": 64, "n_threads": runtime.n_threads}
        with closing(NativeContext(model, **size)) as context:
            given, scales = (C.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if C.llama_set_adapters_lora(context.pointer, given, 1, scales):
                raise ModelLoadError("llama.cpp does not take the adapter")
            yield context


def bare(context: NativeContext, prompt: list[int], sampling: SamplingConfig) -> Timed:
    """The shortest loop there is: decode, sample, feed back."""
    context.clear()
    begin = time.perf_counter()
    for start in range(0, len(prompt) - 1, context.n_batch):
        context.decode_span(np.array(prompt[:-1][start : start + context.n_batch], np.int32), start)
    C, handle, batch = context.C, context.pointer, context.batch
    context.seq[0], context.wanted[0] = 0, 1
    batch.n_tokens = 1
    token, position, times = prompt[-1], len(prompt) - 1, []
    with closing(Sampler(context.model, sampling, sampling.seed)) as sampler:
        while len(times) < sampling.max_tokens:
            context.token[0], context.pos[0] = token, position
            C.llama_decode(handle, batch)
            token = C.llama_sampler_sample(sampler.chain, handle, -1)
            position += 1
            times.append(time.perf_counter())
            if C.llama_vocab_is_eog(context.model.vocab, token):
                break
    return times[0] - begin, max(1, len(times) - 1) / (times[-1] - times[0])


def write_adapter(base: Path, path: Path) -> int:
    """A LoRA adapter with small random numbers in the first factor and zeros in the second; its size in bytes."""
    import gguf

    tensors = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(base).tensors}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    rng = np.random.default_rng(0)
    for name, (n_in, n_out) in ((name, shape) for name, shape in tensors.items() if len(shape) == 2):
        if name.split(".")[-2] in MATRICES:
            a = rng.standard_normal((RANK, n_in), dtype=np.float32).astype(np.float16) * np.float16(0.01)
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", np.zeros((n_out, RANK), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size
