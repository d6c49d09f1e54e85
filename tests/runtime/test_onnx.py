"""The ONNX Runtime engine keeps the contracts of `runtime.base`, on a tiny model and on the default base."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from reference.tiny_checkpoints import make_checkpoint

from edge_align.bases import BaseModel, find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.engines import check_engine
from edge_align.errors import BackendError, BackendUnavailable, ContextOverflow, InputError, SessionClosed
from edge_align.features import AnswerEncoder, embedding_table, open_base_encoder, prompt_features
from edge_align.gguf_tensors import GGUFTensors
from edge_align.records import Completion, GenerationChunk, join_chunks, Message, SteeringVectors, user_prompt
from edge_align.runtime.base import Forking
from edge_align.runtime.llamacpp import LlamaCppBackend, probe_steering
from edge_align.runtime.onnx import OnnxBackend, PREFILL_CHUNK
from edge_align.runtime.onnx_session import choose_provider, OnnxDecoder
from edge_align.runtime.sampling import draw
from edge_align_export.onnx_export import export_onnx

ONE_THREAD = RuntimeConfig(n_threads=1, n_ctx=256)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)
PROMPTS = [[*f"question {i} ".encode() * (i + 1)] for i in range(8)]


def random_vectors(n_layer: int, d_model: int, seed: int, size: float) -> SteeringVectors:
    array = np.random.default_rng(seed).normal(size=(n_layer, d_model)) * size
    array[0] = 0
    return SteeringVectors(array)


@pytest.fixture(scope="module")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(make_checkpoint("llama", folder / "llama"), folder / "export", precision="fp32")
    return folder / "export"


@pytest.fixture(scope="module")
def tiny(tiny_export: Path) -> Iterator[OnnxBackend]:
    with OnnxBackend.open(tiny_export, config=ONE_THREAD) as backend:
        yield backend


@pytest.fixture(scope="module")
def tiny_vectors() -> list[SteeringVectors]:
    return [random_vectors(4, 64, seed, 1.5) for seed in range(8)]


def answer(
    backend: OnnxBackend, prompt: list[int], vectors: SteeringVectors | None, sampling: SamplingConfig
) -> tuple[int, ...]:
    return join_chunks(list(backend.generate(prompt, vectors=vectors, sampling=sampling))).tokens


# -- steering ------------------------------------------------------------------------------------------------------
def test_zero_vectors_and_none_are_the_base_to_the_last_bit(tiny: OnnxBackend, tiny_vectors) -> None:
    zero = tiny_vectors[0].scaled(0.0)
    for sampling in (GREEDY, SamplingConfig(max_tokens=24, seed=3)):
        base = answer(tiny, PROMPTS[2], None, sampling)
        assert answer(tiny, PROMPTS[2], tiny_vectors[0], sampling) != base
        assert answer(tiny, PROMPTS[2], zero, sampling) == base
        assert answer(tiny, PROMPTS[2], None, sampling) == base
    (none,) = tiny.score(PROMPTS[2], [PROMPTS[1]], vectors=None)
    tiny.score(PROMPTS[2], [PROMPTS[1]], vectors=tiny_vectors[0])
    (again,) = tiny.score(PROMPTS[2], [PROMPTS[1]], vectors=zero)
    assert np.array_equal(none, again)


def test_eight_rows_with_eight_vectors_are_eight_single_runs(tiny: OnnxBackend, tiny_vectors) -> None:
    assert tiny.info.per_row_steering
    together = tiny.generate_batch(PROMPTS, vectors=tiny_vectors, sampling=GREEDY)
    singly = [answer(tiny, prompt, vectors, GREEDY) for prompt, vectors in zip(PROMPTS, tiny_vectors, strict=True)]
    assert [row.tokens for row in together] == singly
    assert len(set(singly)) == 8
    mixed = tiny.generate_batch(PROMPTS[:2], vectors=[None, tiny_vectors[1]], sampling=GREEDY)
    assert [row.tokens for row in mixed] == [answer(tiny, PROMPTS[0], None, GREEDY), singly[1]]


def test_more_prompts_than_rows_are_all_answered_in_their_order(tiny: OnnxBackend, tiny_vectors, monkeypatch) -> None:
    monkeypatch.setattr("edge_align.runtime.onnx.N_ROWS", 3)
    sampling, told = SamplingConfig(max_tokens=12, seed=7), []
    found = tiny.generate_batch(PROMPTS, vectors=tiny_vectors[0], sampling=sampling, on_done=told.append)
    assert told == [*range(1, 9)]
    for i, row in enumerate(found):
        own = SamplingConfig(max_tokens=12, seed=7 + i)
        assert row.tokens == answer(tiny, PROMPTS[i], tiny_vectors[0], own)


def test_an_answer_does_not_depend_on_what_was_cached_before(
    tiny: OnnxBackend, tiny_vectors, tiny_export: Path
) -> None:
    long = [*b"x" * (PREFILL_CHUNK + 40), *b" and then?"]
    answer(tiny, long[:-4], tiny_vectors[0], GREEDY)
    last = list(tiny.generate(long, vectors=tiny_vectors[1], sampling=GREEDY))[-1]
    assert last.stats is not None and last.stats.cached_tokens == PREFILL_CHUNK
    with OnnxBackend.open(tiny_export, config=ONE_THREAD) as fresh:
        (first,) = fresh.score(long, [PROMPTS[0]], vectors=tiny_vectors[1])
    (second,) = tiny.score(long, [PROMPTS[0]], vectors=tiny_vectors[1])
    assert np.array_equal(first, second)


# -- forks -------------------------------------------------------------------------------------------------------
def test_forks_decode_in_turns_what_each_decodes_alone(tiny: OnnxBackend, tiny_vectors) -> None:
    assert isinstance(tiny, Forking)
    alone = [answer(tiny, PROMPTS[i], tiny_vectors[i], GREEDY) for i in range(2)]
    with tiny.fork() as other:
        streams = [
            backend.generate(PROMPTS[i], vectors=tiny_vectors[i], sampling=GREEDY)
            for i, backend in enumerate((tiny, other))
        ]
        turns = [[first, second] for first, second in zip_longest(*streams)]
    for i, tokens in enumerate(alone):
        assert join_chunks([turn[i] for turn in turns if turn[i] is not None]).tokens == tokens


def test_a_saved_prompt_is_taken_over_bit_for_bit_and_a_cut_one_refused(tiny: OnnxBackend, tiny_vectors) -> None:
    expected = answer(tiny, PROMPTS[5], tiny_vectors[0], GREEDY)
    held, data = tiny.held, tiny.save_prompt()
    assert held.tolist() == PROMPTS[5][:-1]
    with tiny.fork() as other:
        assert not other.load_prompt(held, data[:-4]) and not len(other.held)
        assert other.load_prompt(held, data) and other.save_prompt() == data
        chunks = list(other.generate(PROMPTS[5], vectors=tiny_vectors[0], sampling=GREEDY))
        assert join_chunks(chunks).tokens == expected
        assert chunks[-1].stats is not None and chunks[-1].stats.cached_tokens == len(held)
        other.forget_prompt()
        assert not len(other.held)


def test_closing_an_engine_closes_its_forks_and_not_the_other_way(tiny_export: Path) -> None:
    backend = OnnxBackend.open(tiny_export, config=ONE_THREAD)
    first, second = backend.fork(), backend.fork()
    first.close()
    second.tokenize("a")
    backend.close()
    with pytest.raises(SessionClosed):
        second.tokenize("a")


# -- rows of one batch -------------------------------------------------------------------------------------------------
@pytest.fixture
def rows(tiny_export: Path) -> Iterator[list[OnnxBackend]]:
    """Three engines whose answers are decoded in one batch, and a fourth for which there is no row left."""
    with OnnxBackend.open(tiny_export, config=RuntimeConfig(n_threads=1, n_ctx=256, n_rows=3)) as backend:
        yield [backend, *(backend.fork() for _ in range(3))]


def in_turns(streams: list[Iterator[GenerationChunk]]) -> list[Completion]:
    """Every stream goes on until it waits for the others."""
    chunks: list[list[GenerationChunk]] = [[] for _ in streams]
    while any(not own or own[-1].finish_reason is None for own in chunks):
        for own, stream in zip(chunks, streams, strict=True):
            for chunk in stream:
                own.append(chunk)
                if not chunk.tokens:
                    break
    return [join_chunks(own) for own in chunks]


def test_rows_share_every_step_and_each_answer_is_the_single_one(rows, tiny, tiny_vectors, monkeypatch) -> None:
    sizes: list[int] = []
    run = OnnxDecoder.run
    monkeypatch.setattr(OnnxDecoder, "run", lambda self, *a, **k: sizes.append(len(a[0])) or run(self, *a, **k))
    each = [tiny_vectors[0], None, tiny_vectors[2], tiny_vectors[3]]
    found = in_turns(
        [row.generate(PROMPTS[i], vectors=each[i], sampling=GREEDY) for i, row in enumerate(rows)],
    )
    assert sizes.count(3) >= 20 and max(sizes) == 3  # the fourth is decoded alone
    monkeypatch.undo()
    assert [one.tokens for one in found] == [answer(tiny, PROMPTS[i], each[i], GREEDY) for i in range(4)]


def test_a_row_that_holds_a_prompt_keeps_it_while_its_neighbours_decode(rows, tiny, tiny_vectors) -> None:
    first, middle, last, _ = rows
    answer(middle, PROMPTS[6], tiny_vectors[1], GREEDY)
    data = middle.save_prompt()
    in_turns([row.generate(PROMPTS[7], vectors=tiny_vectors[0], sampling=GREEDY) for row in (first, last)])
    assert middle.save_prompt() == data
    chunks = list(middle.generate(PROMPTS[6], vectors=tiny_vectors[4], sampling=GREEDY))
    assert chunks[-1].stats is not None and chunks[-1].stats.cached_tokens == len(PROMPTS[6]) - 1
    assert join_chunks(chunks).tokens == answer(tiny, PROMPTS[6], tiny_vectors[4], GREEDY)
    assert last.load_prompt(middle.held, data) and last.save_prompt() == data


def test_an_answer_that_is_given_up_or_replaced_leaves_the_others_as_they_are(rows, tiny, tiny_vectors) -> None:
    given_up = rows[1].generate(PROMPTS[3], vectors=tiny_vectors[1], sampling=GREEDY)
    replaced = rows[2].generate(PROMPTS[4], vectors=tiny_vectors[2], sampling=GREEDY)
    for stream in (given_up, replaced):
        next(stream), next(stream)  # the prompt was read; the first token is asked for
    given_up.close()
    kept = [rows[0].generate(PROMPTS[0], vectors=tiny_vectors[0], sampling=GREEDY)]
    kept.append(rows[2].generate(PROMPTS[2], vectors=None, sampling=GREEDY))
    found = in_turns(kept)
    assert found[0].tokens == answer(tiny, PROMPTS[0], tiny_vectors[0], GREEDY)
    assert found[1].tokens == answer(tiny, PROMPTS[2], None, GREEDY)
    with pytest.raises(BackendError, match="another answer was started"):
        list(replaced)
    rows[2].close()
    assert len(rows[0].fork().held) == 0  # the row that was given back


def test_int4_answers_of_the_default_base_are_the_same_in_a_batch_and_alone(exports, small, base) -> None:
    vectors = [random_vectors(base.n_layer, base.d_model, seed, 0.05) for seed in range(4)]
    prompts = [small.render(user_prompt(f"What is {what}?")) for what in ("a boat", "the sea", "rain", "wind")]
    sampling = SamplingConfig(temperature=0.0, max_tokens=24)
    with OnnxBackend.open(exports["int4"], config=RuntimeConfig(n_threads=1, n_ctx=512, n_rows=4)) as first:
        backends = [first, *(first.fork() for _ in range(3))]
        streams = [
            backend.generate(prompt, vectors=steering, sampling=sampling)
            for backend, prompt, steering in zip(backends, prompts, vectors, strict=True)
        ]
        together = in_turns(streams)
        data = [backend.save_prompt() for backend in backends]
    for prompt, steering, found, kept in zip(prompts, vectors, together, data, strict=True):
        assert answer(small, prompt, steering, sampling) == found.tokens
        assert small.save_prompt() == kept


# -- streaming -----------------------------------------------------------------------------------------------------
def test_a_seed_fixes_an_answer_and_chunks_add_up_to_it(tiny: OnnxBackend) -> None:
    sampling = SamplingConfig(max_tokens=30, seed=5)
    chunks = list(tiny.generate(PROMPTS[1], vectors=None, sampling=sampling))
    whole = join_chunks(chunks)
    assert whole.tokens == answer(tiny, PROMPTS[1], None, sampling)
    assert whole.tokens != answer(tiny, PROMPTS[1], None, SamplingConfig(max_tokens=30, seed=6))
    assert whole.text == bytes(token for token in whole.tokens if token < 256).decode("utf-8", "replace")
    (row,) = tiny.generate_batch([PROMPTS[1]], vectors=None, sampling=sampling)
    assert (row.text, row.tokens, row.finish_reason) == (whole.text, whole.tokens, whole.finish_reason)


def test_stop_strings_cancellation_and_a_second_answer_end_the_first(tiny: OnnxBackend) -> None:
    whole = join_chunks(list(tiny.generate(PROMPTS[1], vectors=None, sampling=GREEDY)))
    stop = whole.text[5:7]
    cut = join_chunks(
        list(
            tiny.generate(
                PROMPTS[1], vectors=None, sampling=SamplingConfig(temperature=0.0, max_tokens=24, stop=(stop,))
            )
        )
    )
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    ended = join_chunks(list(tiny.generate(PROMPTS[1], vectors=None, sampling=GREEDY, cancelled=lambda: True)))
    assert (ended.tokens, ended.finish_reason) == ((), "cancelled")
    first = tiny.generate(PROMPTS[1], vectors=None, sampling=GREEDY)
    next(first)
    answer(tiny, PROMPTS[2], None, GREEDY)
    with pytest.raises(BackendError, match="another answer was started"):
        list(first)


def test_a_template_and_bos_travel_along_and_messages_cannot_pose_as_control_tokens(tiny: OnnxBackend) -> None:
    tokens = tiny.render((Message("user", "a<|im_end|>b"),))
    start, end = 259, 260
    assert tokens == [start, *b"user a<|im_end|>b", end, start, *b"assistant "]
    assert tiny.tokenize("<eos>") == [*b"<eos>"] and tiny.tokenize("<eos>", special=True) == [258]
    assert tiny.detokenize([start, *"hé".encode(), 0xC3]) == "hé\ufffd"


def test_the_context_is_used_to_its_last_token_and_not_beyond(tiny: OnnxBackend) -> None:
    n_ctx = tiny.info.n_ctx
    sampling = SamplingConfig(temperature=0.0, max_tokens=9)
    assert len(answer(tiny, [7] * n_ctx, None, sampling)) <= 1
    with pytest.raises(ContextOverflow, match=f"is {n_ctx + 1} tokens long and the context holds {n_ctx}"):
        tiny.generate([7] * (n_ctx + 1), vectors=None, sampling=sampling)


def test_misuse_raises_our_errors(tiny: OnnxBackend, tiny_export: Path, tiny_vectors) -> None:
    with pytest.raises(InputError, match="outside the vocabulary of 262"):
        tiny.generate([262], vectors=None, sampling=GREEDY)
    with pytest.raises(InputError, match="is empty"):
        tiny.score([], [[1]], vectors=None)
    with pytest.raises(InputError, match=r"shape \(3, 64\); this base has \(4, 64\)"):
        tiny.generate([1], vectors=random_vectors(3, 64, 0, 1.0), sampling=GREEDY)
    with pytest.raises(InputError, match="2 prompts and 1 steering vectors"):
        tiny.generate_batch(PROMPTS[:2], vectors=tiny_vectors[:1], sampling=GREEDY)
    backend = OnnxBackend.open(tiny_export, config=ONE_THREAD)
    backend.close()
    backend.close()
    with pytest.raises(SessionClosed):
        backend.tokenize("a")


def test_a_provider_is_chosen_with_its_reason_or_refused_with_a_remedy() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert choose_provider(RuntimeConfig(), [cpu]).device == "cpu"
    assert "--n-gpu-layers -1 uses CUDA" in choose_provider(RuntimeConfig(), [cuda, cpu]).reason
    assert choose_provider(RuntimeConfig(n_gpu_layers=-1), [cuda, cpu]).names == (cuda, cpu)
    with pytest.raises(BackendUnavailable, match=r"edge-align\[onnx-gpu\]"):
        choose_provider(RuntimeConfig(n_gpu_layers=-1), [cpu])


def test_drawing_follows_the_distribution_written_out_by_hand() -> None:
    """Top-k 3 of 4, then top-p .8 keeps two of them, then temperature 2: odds 2 : 1 become sqrt 2 : 1."""
    logits = np.log(np.array([0.5, 0.05, 0.25, 0.2], np.float32))
    sampling = SamplingConfig(top_k=3, top_p=0.6, temperature=2.0)
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(logits, sampling, rng) for _ in range(4000)], minlength=4)
    assert counts[1] == counts[3] == 0
    assert counts[0] / 4000 == pytest.approx(2**0.5 / (1 + 2**0.5), abs=0.03)


# -- the default base ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exports(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("base")
    for precision in ("fp32", "int4"):
        export_onnx(base.path, folder / precision, precision=precision, base_id=base.id)
    return {precision: folder / precision for precision in ("fp32", "int4")}


@pytest.fixture(scope="module")
def full(exports: dict[str, Path]) -> Iterator[OnnxBackend]:
    with OnnxBackend.open(exports["fp32"], config=RuntimeConfig(n_threads=1, n_ctx=512)) as backend:
        yield backend


@pytest.fixture(scope="module")
def small(exports: dict[str, Path]) -> Iterator[OnnxBackend]:
    with OnnxBackend.open(exports["int4"], config=RuntimeConfig(n_threads=1, n_ctx=512)) as backend:
        yield backend


def test_fp32_logits_and_greedy_text_are_the_torch_references(base: BaseModel, full: OnnxBackend) -> None:
    """Greedy text is checked by scoring it: the reference's likeliest token is the one taken at all 64 places."""
    from edge_align.runtime.torch_ref import LlamaReference

    reference = LlamaReference(base.path)
    prompt = full.render(user_prompt("How does a bicycle stay upright?"))
    for vectors in (None, random_vectors(base.n_layer, base.d_model, 1, 0.05)):
        tokens = answer(full, prompt, vectors, SamplingConfig(temperature=0.0, max_tokens=64))
        (got,) = full.score(prompt, [tokens], vectors=vectors)
        expected = reference.score(prompt, tokens, None if vectors is None else vectors.array)
        assert np.abs(got - expected).max() <= 1e-3
        assert tuple(expected.argmax(-1)) == tokens


def log_probs(logits: np.ndarray, tokens: list[int]) -> float:
    shifted = logits - logits.max(-1, keepdims=True)
    found = shifted[np.arange(len(tokens)), tokens] - np.log(np.exp(shifted).sum(-1))
    return float(found.sum())


def test_int4_changes_preferences_by_the_same_vectors_as_fp32_within_a_tenth(
    full: OnnxBackend, small: OnnxBackend
) -> None:
    """log p(chosen) - log p(rejected), steered less unsteered, by the shipped pack's directions."""
    from edge_align.home import Home
    from edge_align.registry import find_pack

    pack = find_pack(find_base(), Home(Path("nowhere")))
    prompt = full.render(user_prompt("What should I pack for a weekend by the sea?"))
    pair = [
        full.tokenize("You should bring your swimsuit, a towel, and anything else that makes you happy!"),
        full.tokenize("The necessary equipment consists of protective clothing, footwear, and documentation."),
    ]
    effects = []
    for seed in range(4):
        z = np.random.default_rng(seed).standard_normal(pack.k).astype(np.float32)
        vectors = pack.decode(z * pack.scale_for(z[None], 0.4))
        effect = []
        for backend in (full, small):
            steered, plain = (
                [
                    log_probs(logits, tokens)
                    for logits, tokens in zip(backend.score(prompt, pair, vectors=v), pair, strict=True)
                ]
                for v in (vectors, None)
            )
            effect.append((steered[0] - steered[1]) - (plain[0] - plain[1]))
        effects.append(effect)
    ours, reference = np.array(effects).T[::-1]
    assert np.abs(ours - reference).sum() <= 0.1 * np.abs(reference).sum()


def test_tokens_and_templates_are_llama_cpps_own(base: BaseModel, small: OnnxBackend, backend: LlamaCppBackend) -> None:
    from edge_align.simulation.prompts import prompts

    texts = [*prompts("test")[:60]]
    texts += [Path(__file__).read_text(), (Path(__file__).parents[2] / "docs" / "design.md").read_text()]
    texts += ["<|im_start|>", "a <|im_end|> b", "\u0000", "x\u0301" * 40, "１２３ ١٢٣ 12 345"]
    for text in texts:
        for special in (True, False):
            assert small.tokenize(text, special=special) == backend.tokenize(text, special=special)
        assert small.render(user_prompt(text, system="Be brief.")) == backend.render(
            user_prompt(text, system="Be brief.")
        )
    tokens = backend.tokenize("Ça va? 日本 👩‍🚀", special=False)
    assert small.detokenize(tokens) == backend.detokenize(tokens) == "Ça va? 日本 👩‍🚀"


def test_steering_is_seen_by_the_probe_and_the_encoder_reads_the_ggufs_features(
    base: BaseModel, exports: dict[str, Path], small: OnnxBackend
) -> None:
    assert probe_steering(small)
    exported = find_base(str(exports["int4"]))
    assert (exported.id, exported.hash, exported.engine) == (base.id, base.hash, "onnx")
    answers = [small.tokenize("A towel, a hat and a good book."), small.tokenize("Hello!")]
    found = open_base_encoder(exported, n_threads=1).encode(answers)
    expected = AnswerEncoder(base.path, bf16=False).encode(answers)
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)
    described = prompt_features(embedding_table(exported), answers)
    np.testing.assert_allclose(described, prompt_features(GGUFTensors(base.path), answers), atol=2e-3)


def test_an_engine_that_does_not_read_the_files_is_refused_with_the_way_out(
    base: BaseModel, exports: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match="export it first with: edge-align export onnx --from"):
        check_engine(base, "onnx")
    with pytest.raises(InputError, match="is an ONNX export; leave out --engine"):
        check_engine(find_base(str(exports["fp32"])), "llamacpp")


@pytest.mark.parametrize("first", ["edge_align", "edge_align.runtime.onnx_session"])
def test_a_session_leaves_nothing_in_the_home_of_who_runs_it(tmp_path: Path, first: str) -> None:
    """ONNX Runtime 1.32 wrote a device id and a database of events there."""
    script = f"""
import {first}
import onnxruntime
from onnx import helper, TensorProto
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString())
"""
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
