"""How cost grows: with the pairs of a person, with the profiles on a disk, and with the size of the base.

    python bench/scale.py --threads 2 --save

Each table ends in the exponent b of cost ~ n^b, fitted by least squares to the logarithms of its larger half. People
are made up in latent space, feedback is made-up text, and bases have random weights behind the default base's
tokenizer, in Q8_0: what they say means nothing, what they cost is what a model of that shape costs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, console, fresh_home, main, parser, progress, random_latent, save_latent
from rich.table import Table

from edge_align.config import RuntimeConfig
from edge_align.features import AnswerEncoder
from edge_align.latent_dpo import LatentFeedback
from edge_align.learning import learn
from edge_align.pairs import build
from edge_align.personalize import NEWEST
from edge_align.profiles import ProfileStore
from edge_align.records import FeedbackRow, user_prompt
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.server.engine import Shelf
from edge_align.speed import measure_latency, some_vectors, stage_seconds
from edge_align.store import FeedbackLog

SHAPES = ((4, 256), (8, 384), (12, 512), (16, 768), (24, 1024))  # (n_layer, d_model)
ANSWERS, TOKENS = 64, 75  # what an encoder is timed on
Row = dict[str, Any]


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.pairs, args.rows, args.profiles, args.shapes, args.runs, args.tokens = "12,24", "50,100", "4,8", 2, 1, 6
    found = {
        "pairs": pairs(bench, _numbers(args.pairs)),
        "rows": rows(bench, _numbers(args.rows)),
        "profiles": profiles(bench, _numbers(args.profiles)),
        "models": models(bench, SHAPES[: args.shapes]),
    }
    for name, part in found.items():
        show(name, part)
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def exponents(rows: Sequence[Row], size: str, costs: Sequence[str]) -> dict[str, float]:
    """b of cost ~ size^b for each cost, over the larger half of the sizes (at least two)."""
    kept = sorted(rows, key=lambda row: row[size])[min(len(rows) // 2, len(rows) - 2) :]
    x = np.log([row[size] for row in kept])
    return {name: float(np.polyfit(x, np.log([row[name] for row in kept]), 1)[0]) for name in costs}


def seconds_of(work: Callable[[], Any], runs: int) -> float:
    """Median wall seconds; a first call is a warm-up."""
    return stage_seconds({"work": work}, runs, tell=lambda _done: None)["work"]


# -- one person --------------------------------------------------------------------------------------------------------
def pairs(bench: Bench, sizes: Sequence[int]) -> dict[str, Any]:
    """Fit, gate and head selection on latents that are there already; what is read of a person is at most NEWEST."""
    found = []
    for n in sizes:
        people = someone(bench, n)
        found.append(
            {"pairs": n, "fit_sec": seconds_of(lambda p=people: learn(bench.pack, p, seed=0), bench.args.runs)}
        )
    return {"rows": found, "exponents": exponents(found, "pairs", ["fit_sec"]), "most": NEWEST}


def someone(bench: Bench, n: int) -> LatentFeedback:
    """`n` pairs of a person with a taste, each on a prompt of its own."""
    rng, k, pack = np.random.default_rng(n), bench.pack.k, bench.pack
    a, b = rng.standard_normal((2, n, k)).astype(np.float32)
    taste = rng.standard_normal(k) * 0.3
    swap = (a - b) @ taste + rng.standard_normal(n) < 0
    a[swap], b[swap] = b[swap], a[swap]
    return LatentFeedback(
        chosen=a,
        rejected=b,
        pair_features=rng.standard_normal((n, pack.prompt_projection.shape[1])).astype(np.float32),
        pair_weight=np.ones(n, np.float32),
        pair_group=np.arange(n),
        rated=np.zeros((0, k), np.float32),
        rated_up=np.zeros(0, bool),
        rated_features=np.zeros((0, pack.prompt_projection.shape[1]), np.float32),
        rated_weight=np.zeros(0, np.float32),
        rated_group=np.zeros(0, np.int64),
    )


def rows(bench: Bench, sizes: Sequence[int]) -> dict[str, Any]:
    """Adding rows to a log, adding one more, and reading the newest for learning."""
    found = []
    for n in sizes:
        with fresh_home(bench) as home, FeedbackLog(home) as log:
            start = time.perf_counter()
            log.append("someone", verdicts(n))
            added = time.perf_counter() - start
            late = iter(verdicts(n + 100, start=n))
            one = seconds_of(lambda w=late, own=log: own.append("someone", [next(w)]), bench.args.runs)
            read = seconds_of(lambda own=log: build(own.rows("someone", NEWEST)), bench.args.runs)
            found.append({"rows": n, "append_sec": added, "append_one_sec": one, "read_newest_sec": read})
    return {"rows": found, "exponents": exponents(found, "rows", ["append_sec", "append_one_sec", "read_newest_sec"])}


def verdicts(end: int, *, start: int = 0) -> Iterator[FeedbackRow]:
    filler = "a sentence of an answer as long as answers are, more or less. " * 5
    for i in range(start, end):
        yield FeedbackRow(user_prompt(f"question {i}"), chosen=f"{filler}{i}", rejected=f"no {filler}{i}")


# -- many people -------------------------------------------------------------------------------------------------------
def profiles(bench: Bench, sizes: Sequence[int]) -> dict[str, Any]:
    """Names of all; opening one; and what the server does for a request, cold and when the profile is at hand."""
    found = []
    with fresh_home(bench) as home:
        save_latent(bench, home, "p0", random_latent(bench, 0))
        made, store = 1, ProfileStore(home)
        with progress("profiles", max(sizes)) as tell:
            for n in sorted(sizes):
                while made < n:
                    shutil.copytree(home.profiles_dir / "p0", home.profiles_dir / f"p{made}")
                    made += 1
                    tell(made)
                names = iter(f"p{i}" for i in np.random.default_rng(n).permutation(n).tolist() * 20)
                shelf = Shelf(home, bench.base, bench.backend, bench.runtime)
                prompt = user_prompt("How do boats float?")
                shelf.steering("p0", prompt, 1.0)  # opens the pack
                found.append(
                    {
                        "profiles": n,
                        "names_sec": seconds_of(store.names, bench.args.runs),
                        "open_sec": seconds_of(lambda w=names: store.load_usable(next(w)), bench.args.runs),
                        "first_request_sec": seconds_of(
                            lambda s=shelf, w=names, p=prompt: s.steering(next(w), p, 1.0), bench.args.runs
                        ),
                        "next_request_sec": seconds_of(
                            lambda s=shelf, p=prompt: s.steering("p0", p, 1.0), bench.args.runs
                        ),
                    }
                )
        weight = sum(file.stat().st_size for file in (home.profiles_dir / "p0").rglob("*") if file.is_file())
    costs = ["names_sec", "open_sec", "first_request_sec", "next_request_sec"]
    return {"rows": found, "exponents": exponents(found, "profiles", costs), "bytes_per_profile": weight}


# -- many bases --------------------------------------------------------------------------------------------------------
def models(bench: Bench, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Decoding, what steering adds to it, a change of vectors, and reading answers, over random bases."""
    args, found = bench.args, []
    n_vocab = bench.backend.info.n_vocab
    answers = np.random.default_rng(0).integers(n_vocab // 50, n_vocab * 4 // 5, (ANSWERS, TOKENS)).tolist()
    for n_layer, d_model in shapes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            weights = random_base(bench.base.path, path, n_layer=n_layer, d_model=d_model)
            with LlamaCppBackend.open(path, config=RuntimeConfig(n_ctx=1024, n_threads=args.threads)) as backend:
                speed = measure_latency(
                    backend, runs=args.runs, tokens=args.tokens, prompt_tokens=(), tell=lambda _what, _done: None
                )
                switch = seconds_of(lambda b=backend: switched(b), args.runs)
            encoder = AnswerEncoder(path)
            encoding = seconds_of(lambda e=encoder: e.encode(answers), args.runs)
            row = {"n_layer": n_layer, "d_model": d_model, "weights": weights, "token_sec": 1 / speed.base_tps}
            row |= {"steered_over_base": asdict(speed.personal_over_base), "switch_sec": switch}
            row |= {"encode_sec_per_1000_tokens": encoding * 1000 / (ANSWERS * TOKENS)}
            found.append(row)
            console.print(row)
    costs = ["token_sec", "switch_sec", "encode_sec_per_1000_tokens"]
    return {"rows": found, "exponents": exponents(found, "weights", costs)}


def switched(backend: LlamaCppBackend) -> None:
    """Set other vectors; the numbers alternate, so that nothing is found to be set already."""
    vectors = some_vectors(backend)
    for factor in (1.0, 1.1):
        backend._context.set_vectors(vectors.scaled(factor))


def random_base(like: Path, path: Path, *, n_layer: int, d_model: int) -> int:
    """Write a GGUF of the Llama family with random Q8_0 weights and `like`'s tokenizer; returns how many weights."""
    import gguf

    heads, kv_heads, d_ff = d_model // 64, d_model // 128, 8 * d_model // 3 // 64 * 64
    reader = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_ff)
    writer.add_context_length(2048)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10_000.0)
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    kv = kv_heads * 64
    shapes = {"token_embd": (n_vocab, d_model)}
    for il in range(n_layer):
        block = {"attn_q": (d_model, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model)}
        block |= {"attn_output": (d_model, d_model), "ffn_gate": (d_ff, d_model), "ffn_up": (d_ff, d_model)}
        block |= {"ffn_down": (d_model, d_ff)}
        shapes |= {f"blk.{il}.{name}": shape for name, shape in block.items()}
    rng, q8, total = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0, 0
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1]))
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, q8), raw_dtype=q8)
        total += weight.size
    norms = ["output_norm", *(f"blk.{il}.{part}_norm" for il in range(n_layer) for part in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(d_model, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def show(name: str, part: dict[str, Any]) -> None:
    heads = list(part["rows"][0])
    grows = ", ".join(f"{cost} ~ n^{b:.2f}" for cost, b in part["exponents"].items())
    table = Table(*heads, title=name, caption=grows)
    for row in part["rows"]:
        plain = [value["median"] if isinstance(value, dict) else value for value in row.values()]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in plain))
    console.print(table)


if __name__ == "__main__":
    p = parser("How cost grows with pairs, rows, profiles and weights.")
    p.add_argument(
        "--pairs", default="20,50,100,200,500,1000,2000", help="of a person, whose latents are there already"
    )
    p.add_argument("--rows", default="100,1000,10000,100000", help="in a feedback log")
    p.add_argument("--profiles", default="10,100,1000,10000,100000", help="on a disk")
    p.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the random bases")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--tokens", type=int, default=48, help="decoded per answer")
    main(run, p.parse_args(), __file__)
