"""What the bench scripts share: where things are, caches, users' pairs, steered sampling, and the JSON at the end.

Every script prints a table and progress on stderr and one JSON document as the last line of stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "export")]  # measure this checkout, whatever else is installed

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from edge_align.bases import find_base  # noqa: E402
from edge_align.config import PersonalizeConfig, RuntimeConfig, SamplingConfig  # noqa: E402
from edge_align.encoder import PreferenceEncoder  # noqa: E402
from edge_align.errors import BackendUnavailable, EdgeAlignError  # noqa: E402
from edge_align.features import prompt_features  # noqa: E402
from edge_align.gguf_tensors import GGUFTensors  # noqa: E402
from edge_align.home import Home  # noqa: E402
from edge_align.kl import log_softmax  # noqa: E402
from edge_align.latent_dpo import LatentFeedback  # noqa: E402
from edge_align.learning import calibrate, Checked, encode_dataset, keep_fluent, learn, Learnt  # noqa: E402
from edge_align.pairs import build, Dataset  # noqa: E402
from edge_align.profiles import ProfileStore  # noqa: E402
from edge_align.records import FeedbackRow, PreferencePair, Prompt, Rating, SteeringVectors, user_prompt  # noqa: E402
from edge_align.registry import find_pack  # noqa: E402
from edge_align.runtime.llamacpp import LlamaCppBackend  # noqa: E402
from edge_align.simulation.prompts import prompts  # noqa: E402
from edge_align.simulation.users import GROUPS, make_pairs, User, user, USERS  # noqa: E402
from edge_align_export.passes import open_passes, Passes  # noqa: E402

RESULTS = ROOT / "bench" / "results"
CHUNK = 50  # rows decoded together, and kept together
PER_PROMPT = 4  # answers to a training prompt, of which users make pairs
TRAIN_TOKENS = 256  # cap of a training answer
SEED = 7

console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


# -- command line --------------------------------------------------------------------------------------------------
def parser(text: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", help="id or GGUF path of the base")
    made.add_argument("--home", help="folder in which a pack is looked for first")
    made.add_argument("--cache", metavar="DIR", help="folder of kept answers (default: cache/bench in the home)")
    made.add_argument("--threads", type=int, default=0, help="0: one per core")
    made.add_argument("--n-gpu-layers", type=int, default=0, help="blocks that llama.cpp runs on the GPU; -1: all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; the figures mean nothing")
    made.add_argument("--save", action="store_true", help="also write the JSON document under bench/results")
    return made


def main(script: Callable[[Bench], dict[str, Any]], args: argparse.Namespace, name: str) -> None:
    """Run a script and print its document; an error of edge-align's own becomes one line and exit code 2."""
    start = time.perf_counter()
    try:
        with Bench.open(args) as bench:
            result = script(bench)
            document = provenance(bench, name, time.perf_counter() - start) | result
    except EdgeAlignError as error:
        sys.exit(f"{Path(name).stem}: {error}")
    emit(document, save=args.save)


def emit(document: dict[str, Any], *, save: bool) -> None:
    """Print the document as the last line of stdout."""
    text = json.dumps(document, default=_plain, allow_nan=False)
    if save:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{document['script']}-{document['date'][:10]}-{document['commit']}"
        names = (f"{stem}{end}.json" for end in ("", *(f"-{i}" for i in range(2, 1000))))
        path = next(RESULTS / name for name in names if not (RESULTS / name).exists())
        path.write_text(json.dumps(document, default=_plain, indent=1) + "\n")
        console.print(f"written: bench/results/{path.name}")
    print(text, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a result")


def provenance(bench: Bench, name: str, seconds: float) -> dict[str, Any]:
    """What a figure depends on besides the script; no paths."""
    hidden = ("home", "cache", "save", "model", "packs", "export", "genai", "optimum")  # no paths
    return {
        "script": Path(name).stem,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("EDGE_ALIGN_COMMIT", "unknown"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "versions": versions(),
        "base": bench.base.id,
        "base_about": f"{bench.base.header.architecture}, {bench.base.n_layer} blocks of width {bench.base.d_model}",
        "base_hash": bench.base.hash,
        "pack_hash": bench.pack.hash if "pack" in bench.__dict__ else None,
        "options": {key: value for key, value in vars(bench.args).items() if key not in hidden},
        "seconds": round(seconds, 1),
    }


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory, and whether bfloat16 matrix products have instructions of their own."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("llama-cpp-python", "onnxruntime", "torch", "numpy", "peft", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; the function it gives is told how much is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


# -- what is measured ----------------------------------------------------------------------------------------------
class Bench:
    """The base, its pack, the engine and the caches of one run; opened when first used."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.home = Home.find(args.home)
        self.base = find_base(args.model, home=self.home)
        self.runtime = RuntimeConfig(n_threads=args.threads, n_gpu_layers=args.n_gpu_layers)
        self.cache = Path(args.cache) if args.cache else self.home.cache_dir / "bench"

    @classmethod
    def open(cls, args: argparse.Namespace) -> Bench:
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        return cls(args)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        if "backend" in self.__dict__:
            self.backend.close()

    @cached_property
    def pack(self) -> Any:
        return find_pack(self.base, self.home)

    @cached_property
    def backend(self) -> LlamaCppBackend:
        return LlamaCppBackend.open(self.base.path, config=self.runtime)

    @cached_property
    def passes(self) -> Passes:
        return open_passes(self.base, self.backend, runtime=self.runtime)

    @cached_property
    def reference(self) -> Any:
        return reference_model(self)

    @cached_property
    def eos(self) -> int:
        """The token that an answer usually ends with."""
        return self.backend.ends[0]

    def keep(self, name: str, *depends_on: Any) -> Kept:
        """Rows kept under a name and everything they depend on."""
        return Kept(self.cache / f"{name}-{digest(self.base.hash, *depends_on)}.jsonl")


class Kept:
    """Rows of JSON that survive the process, one a line, so that a stopped run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    break  # a line cut short by a kill; it and what follows is made again
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Any) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def digest(*values: Any) -> str:
    """Twelve hex digits that name these values (JSON-like, arrays or bytes)."""
    total = hashlib.sha256()
    for value in values:
        data = value.tobytes() if isinstance(value, np.ndarray) else value
        total.update(data if isinstance(data, bytes) else json.dumps(data).encode())
        total.update(b"\0")
    return total.hexdigest()[:12]


def source_digest(*names: str) -> str:
    """Names the source of some modules, for what is kept of their results."""
    return digest(*[(ROOT / (name.replace(".", "/") + ".py")).read_bytes() for name in names])


# -- homes ---------------------------------------------------------------------------------------------------------
@contextmanager
def fresh_home(bench: Bench) -> Iterator[Home]:
    """A home folder for one block, with the packs of the bench's own."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        if bench.home.packs_dir.is_dir():
            shutil.copytree(bench.home.packs_dir, home.packs_dir)
        yield home


def random_latent(bench: Bench, seed: int) -> np.ndarray:
    """(k,) float32: a direction at a predicted KL of 0.25, for what depends on no particular taste."""
    z = np.random.default_rng(seed).standard_normal(bench.pack.k).astype(np.float32)
    return np.asarray(z * bench.pack.scale_for(z[None], 0.25), np.float32)


def save_latent(bench: Bench, home: Home, name: str, z: np.ndarray) -> None:
    """A profile that steers with the latent z (k,), active and in use."""
    pack = bench.pack
    encoder = PreferenceEncoder(z, np.zeros((0, 0), np.float32), np.zeros((pack.k, 0), np.float32), 1.0)
    manifest = {"base_hash": bench.base.hash, "pack_hash": pack.hash, "k": pack.k}
    manifest |= {"n_layer": pack.n_layer, "d_model": pack.d_model, "predicted_kl": 0.25}
    store = ProfileStore(home)
    store.activate(name, store.save(name, encoder.to_tensors(), manifest).number)
    store.use(name)


# -- answers -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """text; its tokens, end of text excluded."""

    text: str
    tokens: list[int]


def train_store(bench: Bench) -> Kept:
    """Kept answers of the base to training prompts, a row per prompt."""
    return bench.keep("train", PER_PROMPT, TRAIN_TOKENS, SEED)


def train_answers(bench: Bench, n: int | None = None) -> tuple[list[str], list[list[str]]]:
    """(questions, texts of the answers to each), in the order of the prompt set; what `answers.py` has made."""
    rows = {row["prompt"]: [answer["text"] for answer in row["answers"]] for row in train_store(bench).rows}
    questions = [question for question in prompts("train") if question in rows][:n]
    if not questions:
        raise SystemExit("there are no training answers yet; run: python bench/answers.py --set train")
    return questions, [rows[question] for question in questions]


def sample(
    bench: Bench,
    questions: Sequence[str],
    *,
    max_tokens: int,
    seed: int,
    encoder: PreferenceEncoder | None = None,
    strength: float = 1.0,
    vectors: list[SteeringVectors | None] | None = None,
    ask: Callable[[str], Prompt] = user_prompt,
    label: str = "sampling",
) -> list[Answer]:
    """One answer per question from llama.cpp, base or steered; kept, and resumed chunk by chunk. Row i: seed + i.

    vectors: instead of those of `encoder`. ask: the conversation a question comes in.
    """
    vectors = steering(bench, encoder, questions, strength) if vectors is None else vectors
    whole = digest(*[b"" if v is None else v.array for v in {id(v): v for v in vectors}.values()])
    asked = [ask(question) for question in questions]
    words = list(questions) if ask is user_prompt else [[turn.content for turn in prompt] for prompt in asked]
    kept = bench.keep("answers", words, max_tokens, seed, whole)
    with progress(label, len(questions)) as tell:
        while len(kept.rows) < len(questions):
            start = len(kept.rows)
            tell(start)
            stop = start + 1
            while stop < min(start + CHUNK, len(questions)) and vectors[stop] is vectors[start]:
                stop += 1
            made = bench.backend.generate_batch(
                [bench.backend.render(prompt) for prompt in asked[start:stop]],
                vectors=vectors[start],
                sampling=SamplingConfig(max_tokens=max_tokens, seed=seed + start),
            )
            for answer in made:
                kept.add({"text": answer.text, "tokens": list(answer.tokens)})
    return [Answer(row["text"], row["tokens"]) for row in kept.rows]


def steering(
    bench: Bench, encoder: PreferenceEncoder | None, questions: Sequence[str], strength: float = 1.0
) -> list[SteeringVectors | None]:
    """What a profile adds for each question; one object for all when it does not depend on the prompt."""
    if encoder is None or strength == 0.0:
        return [None] * len(questions)
    if not encoder.depends_on_prompt:
        return [bench.pack.decode(encoder.latent() * strength)] * len(questions)
    tokens = [bench.backend.tokenize(question) or [0] for question in questions]
    inputs = bench.pack.head_inputs(prompt_features(GGUFTensors(bench.base.path), tokens))
    return [bench.pack.decode(encoder.latent(row) * strength) for row in inputs]


def sample_rows(
    bench: Bench,
    model: Any,
    questions: Sequence[str],
    vectors: np.ndarray | None,
    *,
    max_tokens: int,
    seed: int,
    kept: Kept,
    batch: int = 96,
    before: Sequence[int] = (),
    label: str = "sampling",
) -> list[Answer]:
    """As `sample`, from the PyTorch reference, whose rows may be steered differently: vectors (n, n_layer, d_model).

    before: tokens ahead of every prompt.
    """
    from edge_align.runtime import torch_sample

    rendered = {question: bench.backend.render(user_prompt(question)) for question in set(questions)}
    with progress(label, len(questions)) as tell:
        for start in range(len(kept.rows), len(questions), batch):
            tell(start)
            part = slice(start, start + batch)
            made = torch_sample.sample(
                model,
                [[*before, *rendered[question]] for question in questions[part]],
                sampling=SamplingConfig(max_tokens=max_tokens, seed=seed + start),
                eos=[bench.eos],
                vectors=None if vectors is None else vectors[part],
                batch=batch,
            )
            for tokens in made:
                tokens = [token for token in tokens if token != bench.eos]
                kept.add({"text": bench.backend.detokenize(tokens), "tokens": tokens})
    return [Answer(row["text"], row["tokens"]) for row in kept.rows]


def sample_reference(
    bench: Bench, questions: Sequence[str], vectors: np.ndarray | None, *, max_tokens: int, label: str
) -> list[Answer]:
    """`sample_rows` of the base in PyTorch, as it is or under vectors (n, n_layer, d_model); kept."""
    seed, model, asked = bench.args.seed + SEED, bench.reference, list(questions)
    depends = [] if vectors is None else [digest(vectors)]
    kept = bench.keep("rows", asked, max_tokens, seed, str(model.dtype), *depends)
    return sample_rows(bench, model, asked, vectors, max_tokens=max_tokens, seed=seed, kept=kept, label=label)


def reference_model(bench: Bench) -> Any:
    """The whole base in PyTorch, on the GPU where there is one; bfloat16 where that is fast, unless --dtype is fp32."""
    import torch

    from edge_align.runtime.torch_ref import fastest, LlamaReference

    device, dtype = fastest()
    if getattr(bench.args, "dtype", None) == "fp32":
        dtype = torch.float32
    return LlamaReference(bench.base.path, dtype=dtype, device=device)


@dataclass(frozen=True)
class ReferenceScorer:
    """The PyTorch reference as what `edge_align.kl` measures. front: tokens ahead of every prompt."""

    model: Any
    front: Sequence[int] = ()

    def score_many(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None = None,
    ) -> list[np.ndarray]:
        array = None if vectors is None else vectors.array
        return [self.model.score([*self.front, *p], c, array) for p, c in zip(prompts, completions, strict=True)]


def steering_rows(bench: Bench, encoder: PreferenceEncoder | None, questions: Sequence[str]) -> np.ndarray:
    """`steering` as one array (n, n_layer, d_model), zeros where nothing is added."""
    zero = np.zeros((bench.pack.n_layer, bench.pack.d_model), np.float32)
    return np.stack([zero if v is None else v.array for v in steering(bench, encoder, questions)])


def nll_under_base(bench: Bench, questions: Sequence[str], answers: Sequence[Answer]) -> float:
    """Mean negative log-likelihood under the unsteered base, nats per token over all tokens of all answers."""
    total, count = np.sum(answer_nlls(bench, questions, answers), axis=0)
    return float(total / max(1, count))


def answer_nlls(bench: Bench, questions: Sequence[str], answers: Sequence[Answer]) -> list[list[float]]:
    """[nats under the unsteered base, tokens] of every answer; kept."""
    kept = bench.keep("nll", list(questions), [answer.tokens for answer in answers])
    jobs = list(zip(questions, answers, strict=True))[len(kept.rows) :]
    rendered = [bench.backend.render(user_prompt(question)) for question, _ in jobs]
    for scores in _log_probs(bench, rendered, [answer.tokens for _, answer in jobs]):
        kept.add([float(-scores.sum()), len(scores)])
    return kept.rows


def _log_probs(
    bench: Bench, rendered: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Log-probability of every token of each answer under the unsteered base.

    The PyTorch reference reads whole texts several times faster than llama.cpp on a processor with bfloat16, where it
    computes the architecture.
    """
    if not answers:
        return
    try:
        yield from bench.reference.log_probs(rendered, answers)
    except BackendUnavailable:
        said = [tokens or [0] for tokens in answers]
        scored = bench.backend.score_many(rendered, said, vectors=None)
        for tokens, own, logits in zip(answers, said, scored, strict=True):
            yield log_softmax(logits)[np.arange(len(own)), own][: len(tokens)]


# -- users ---------------------------------------------------------------------------------------------------------
def chosen_users(names: str | None) -> list[User]:
    """Users by comma-separated names, or a group of them by its own; the eight attributes without any."""
    if names in GROUPS:
        return list(GROUPS[names])
    return [user(name) for name in names.split(",")] if names else list(USERS)


def users_option(p: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--users`, as `chosen_users` reads it."""
    said = f"default: {default or 'the eight attributes'}; groups: {', '.join(GROUPS)}"
    p.add_argument("--users", metavar="A,B|GROUP", default=default, help=said)


def named_folders(text: str) -> dict[str, Path]:
    """NAME=DIR,... of an option; none without any. Raises ValueError, which argparse makes one line of."""
    split = (one.split("=", 1) for one in text.split(",") if one)
    return {name: Path(folder) for name, folder in split}


def count_pairs(who: User, answers: Sequence[Sequence[str]]) -> int:
    """How many pairs this user can tell apart."""
    total = 0
    for texts in answers:
        values = [who.judge(text) for text in texts if text.strip()]
        total += sum(a > b for a in values for b in values)
    return total


def users_pairs(
    who: User, questions: Sequence[str], answers: Sequence[Sequence[str]], *, n: int, seed: int, flip: float = 0.0
) -> list[PreferencePair]:
    """`n` pairs as this user picks them among the training answers, a share `flip` of them the wrong way round."""
    return make_pairs(who, questions, answers, n=n, rng=np.random.default_rng(seed), flip=flip)


def dataset_of(pairs: Sequence[PreferencePair]) -> Dataset:
    """Pairs as `personalize` sees them after the feedback log."""
    return build(FeedbackRow(pair.prompt, chosen=pair.chosen, rejected=pair.rejected) for pair in pairs)


@dataclass(frozen=True)
class Profile:
    """What `personalize` would save, and what it knows about it."""

    encoder: PreferenceEncoder
    predicted_kl: float
    nll_ratio: float | None  # as it was checked
    collision_ratio: float | None
    learnt: Learnt
    stages_sec: dict[str, float]


def learn_profile(bench: Bench, pairs: Sequence[PreferencePair], *, kl_budget: float | None = None) -> Profile:
    """Encode, fit and calibrate exactly as `personalize` does."""
    seconds: dict[str, float] = {}
    dataset, pack = dataset_of(pairs), bench.pack
    seconds["encode"], feedback = timed(lambda: encode_dataset(bench.base, pack, dataset, runtime=bench.runtime))
    seconds["fit"], learnt = timed(lambda: learn(pack, feedback, seed=bench.args.seed))
    budget = PersonalizeConfig().kl_budget if kl_budget is None else kl_budget
    seconds["calibrate"], (encoder, _) = timed(lambda: calibrate(pack, learnt, kl_budget=budget))
    seconds["check"], checked = timed(lambda: check_fluent(bench, learnt, encoder))
    return Profile(checked.encoder, checked.predicted_kl, checked.nll_ratio, checked.collision_ratio, learnt, seconds)


def check_fluent(bench: Bench, learnt: Learnt, encoder: PreferenceEncoder) -> Checked:
    """`keep_fluent` with the limits that `personalize` has."""
    return keep_fluent(bench.base, bench.pack, learnt, encoder, config=PersonalizeConfig(), runtime=bench.runtime)


@dataclass(frozen=True)
class Encoded:
    """Latents of all training answers, so that many draws of pairs need no encoding."""

    row: dict[tuple[str, str], int]  # (question, answer) -> row
    latents: np.ndarray
    features: np.ndarray
    groups: np.ndarray

    def feedback(self, pairs: Sequence[PreferencePair]) -> LatentFeedback:
        """These pairs as training sees them."""
        chosen = [self.row[pair.prompt[-1].content, pair.chosen] for pair in pairs]
        rejected = [self.row[pair.prompt[-1].content, pair.rejected] for pair in pairs]
        return LatentFeedback(
            chosen=self.latents[chosen],
            rejected=self.latents[rejected],
            pair_features=self.features[chosen],
            pair_weight=np.ones(len(pairs), np.float32),
            pair_group=self.groups[chosen],
            rated=self.latents[:0],
            rated_up=np.zeros(0, bool),
            rated_features=self.features[:0],
            rated_weight=np.zeros(0, np.float32),
            rated_group=self.groups[:0],
        )


def encode_answers(bench: Bench, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Encoded:
    """Encode every answer once, through the code that `personalize` runs; kept as arrays."""
    items = [(q, text) for q, texts in zip(questions, answers, strict=True) for text in texts if text.strip()]
    path = bench.cache / f"latents-{digest(bench.pack.hash, items, source_digest('edge_align.features'))}.npz"
    if not path.is_file():
        ratings = tuple(Rating(user_prompt(question), text, True) for question, text in items)
        with progress("encoding", len(items)) as tell:
            found = encode_dataset(
                bench.base,
                bench.pack,
                Dataset(pairs=(), ratings=ratings),
                runtime=bench.runtime,
                tell=lambda done: tell(round(done * len(items))),
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, latents=found.rated, features=found.rated_features, groups=found.rated_group)
        part.replace(path)
    with np.load(path, allow_pickle=False) as kept:
        return Encoded({item: i for i, item in enumerate(items)}, kept["latents"], kept["features"], kept["groups"])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what `work` returned)."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def short_pairs(bench: Bench, who: User, *, n: int, tokens: int) -> list[PreferencePair]:
    """`n` pairs of answers cut to `tokens` tokens, no answer used twice: as much text as n verdicts can bring."""
    found: list[PreferencePair] = []
    questions, answers = train_answers(bench)
    for first in range(0, PER_PROMPT, 2):
        for question, texts in zip(questions, answers, strict=True):
            two = [bench.backend.detokenize(bench.backend.tokenize(t)[:tokens]) for t in texts[first : first + 2]]
            better, worse = sorted(two, key=who.judge, reverse=True)
            if better.strip() and worse.strip() and who.judge(better) > who.judge(worse) and len(found) < n:
                found.append(PreferencePair(user_prompt(question), better, worse))
    return found
