"""The paper's adapter beside additive steering: z as keys and values ahead of a prompt, or as vectors added to blocks.

    python bench/answers.py --set train && python bench/slots.py --save

CLaP (arXiv 2412.20834) turns z into four keys and values in front of every layer's own. Here that adapter and an
additive decoder, both begun at nothing, are trained through the frozen base by the same losses (reconstruction, one
swapped latent) on the same answers, latents and batches; the shipped decoder stands beside them. Then every person's
latent, learnt as ever, is decoded by each at the KL that the shipped decoder costs. People and prompts are those that
choices are made by (validation). What is trained or sampled is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from arms import other_blocks
from common import (
    Answer,
    Bench,
    chosen_users,
    console,
    digest,
    learn_profile,
    main,
    parser,
    progress,
    ReferenceScorer,
    sample_reference,
    sample_rows,
    SEED,
    timed,
    train_answers,
    users_option,
    users_pairs,
)
from lora_dpo import kept_training
from quality import judged, other_judges
from rich.table import Table
from safetensors.torch import load_file

from edge_align.features import open_encoder
from edge_align.kl import measured_kl, open_probe, Probe, sampled_probe, search_factor
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_rows import KVCache
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User
from edge_align_export.clap_loss import Batch, FrozenDecoder, make_batch
from edge_align_export.linear import within

SLOTS = 4  # the paper's number, per layer
INNER = 64  # of the adapter's network
UNIT = 0.1  # of a usual coordinate of a block's output: what Adam's steps are measured in
NLL = Callable[[torch.Tensor], torch.Tensor]
"""Latents (B, k) -> (B,) nats, summed over each answer."""


# -- decoders ------------------------------------------------------------------------------------------------------
class Decoder(Protocol):
    """What turns latents into something the base answers under. front: tokens it puts ahead of every prompt."""

    front: int

    def parameters(self) -> Any: ...

    def bind(self, batch: Batch) -> NLL:
        """The cost of a batch's answers under latents; its prompts begin with `front` tokens of any kind."""
        ...

    def model(self, z: torch.Tensor) -> tuple[LlamaReference, np.ndarray | None]:
        """The base under one latent (k,): a model, and vectors (n_layer, d_model) it is to be steered by."""
        ...


class Additive(torch.nn.Module):
    """Vectors z W on the outputs of some blocks, from the last prompt token on (contract 2)."""

    front = 0

    def __init__(self, base: LlamaReference, spread: torch.Tensor, layers: range, size: torch.Tensor) -> None:
        """spread (k,): of the latents. size (len(layers),): the median of coordinates of the blocks' outputs, without
        sign; a few are a hundred times as large.
        """
        super().__init__()
        self._base, self._layers, self._spread = base, layers, spread
        self.register_buffer("unit", UNIT * size[:, None])
        self.weight = torch.nn.Parameter(torch.zeros(len(spread), len(layers), base.shape.d_model))

    def vectors(self, z: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bk,kld->bld", z / self._spread, self.weight * self.unit)

    def bind(self, batch: Batch) -> NLL:
        frozen = FrozenDecoder(self._base, batch, self._layers)
        return lambda z: frozen.nll(self.vectors(z))

    @torch.no_grad()
    def model(self, z: torch.Tensor) -> tuple[LlamaReference, np.ndarray | None]:
        array = np.zeros((self._base.shape.n_layer, self._base.shape.d_model), np.float32)
        array[list(self._layers)] = self.vectors(z[None])[0].float().numpy()
        return self._base, array


class Slots(torch.nn.Module):
    """A network of z per layer, whose outputs the frozen layer itself turns into keys and values at positions 0 to 3.

    It begins at what the first tokens of a chat give, whatever z is: with four tokens ahead, and no more.
    """

    front = SLOTS

    def __init__(self, base: LlamaReference, spread: torch.Tensor, opening: Sequence[int]) -> None:
        """spread (k,): of the latents. opening: the first SLOTS tokens of a chat."""
        super().__init__()
        self._base, self._spread, k = base, spread, len(spread)
        n, d = base.shape.n_layer, base.shape.d_model
        tokens = torch.tensor([list(opening)])
        with torch.no_grad():
            _, outputs = base.hidden(tokens, layers=range(n - 1))
            inputs = torch.cat([base.embed(tokens), *outputs]).float()  # of every block
            self.rotary = base.rotary(torch.arange(SLOTS)[None])
        self.register_buffer("size", inputs.square().mean(2, keepdim=True).sqrt())  # of each layer and token
        self.start = torch.nn.Parameter(inputs / self.size)
        self.inner = torch.nn.Parameter(torch.randn(n, k, INNER, generator=torch.Generator().manual_seed(0)) / k**0.5)
        self.outer = torch.nn.Parameter(torch.zeros(n, INNER, SLOTS * d))

    def keys_values(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, k) -> keys and values (n_layer, B, n_head_kv, SLOTS, d_head)."""
        s, base = self._base.shape, self._base
        hidden = torch.einsum(
            "lbi,lio->lbo", F.silu(torch.einsum("bk,lki->lbi", z / self._spread, self.inner)), self.outer
        )
        states = self.size[:, None] * (self.start[:, None] + hidden.view(*hidden.shape[:2], SLOTS, s.d_model))
        width = s.n_head_kv * s.d_head
        keys, values = [], []
        for il, block in enumerate(base.blocks):
            made = F.linear(base._norm(states[il].to(base.dtype)), block.qkv[s.d_model :])
            k, v = (part.view(len(z), SLOTS, s.n_head_kv, s.d_head).transpose(1, 2) for part in made.split(width, -1))
            keys.append(base._rotate(k, self.rotary))
            values.append(v)
        return torch.stack(keys), torch.stack(values)

    def bind(self, batch: Batch) -> NLL:
        return lambda z: FrozenDecoder(Slotted(self._base, *self.keys_values(z)), batch, range(0)).nll(None)

    @torch.no_grad()
    def model(self, z: torch.Tensor) -> tuple[LlamaReference, np.ndarray | None]:
        return Slotted(self._base, *self.keys_values(z[None])), None


class Shipped:
    """The pack's own decoder."""

    front = 0

    def __init__(self, base: LlamaReference, decoder: np.ndarray) -> None:
        self._base, self._decoder = base, decoder

    def model(self, z: torch.Tensor) -> tuple[LlamaReference, np.ndarray | None]:
        return self._base, np.tensordot(z.numpy(), self._decoder, axes=1)


class Slotted(LlamaReference):
    """The base with keys and values in the place of those of the first tokens of every row."""

    def __init__(self, base: LlamaReference, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: (n_layer, B or 1, n_head_kv, SLOTS, d_head)."""
        self.__dict__.update(base.__dict__)
        self._keys, self._values = keys, values

    def block(
        self,
        il: int,
        x: torch.Tensor,
        rotary: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        ahead: Any = Ahead(self._keys[il], self._values[il], cache)
        return super().block(il, x, rotary, mask, ahead)


@dataclass(frozen=True)
class Ahead:
    """Stands for a cache (or none): what is stored of a row's first tokens are the slots."""

    keys: torch.Tensor
    values: torch.Tensor
    cache: KVCache | None

    def append(self, il: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if k.shape[2] > 1:
            k, v = (
                torch.cat([slots.expand(len(x), -1, -1, -1), x[:, :, SLOTS:]], 2)
                for slots, x in ((self.keys, k), (self.values, v))
            )
        return (k, v) if self.cache is None else self.cache.append(il, k, v)


# -- training ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Corpus:
    """Answers of the base to prompts of the pack. latents (n, k) float32, centred within the prompt; groups (n,)."""

    prompts: list[list[int]]
    answers: list[list[int]]
    latents: torch.Tensor
    groups: np.ndarray
    end: int
    cap: int

    def batch(self, rows: np.ndarray, n: int, front: int) -> Batch:
        """Those answers, n of each prompt in a row, with the end of text where it was reached."""
        said = [self.answers[i] if len(self.answers[i]) >= self.cap else [*self.answers[i], self.end] for i in rows]
        return make_batch([[self.end] * front + self.prompts[i] for i in rows], said, torch.zeros(len(rows), 1), n=n)

    def rows(self, *, held_out: bool, n: int) -> list[np.ndarray]:
        """n answers to each prompt; every fifth prompt is held out."""
        found = [np.flatnonzero(self.groups == g)[:n] for g in np.unique(self.groups) if (g % 5 == 0) == held_out]
        return [rows for rows in found if len(rows) == n]


def corpus_of(bench: Bench) -> Corpus:
    args = bench.args
    asked = [question for question in prompts("pack")[: args.train_prompts] for _ in range(args.answers)]
    kept = bench.keep("slots", args.train_prompts, args.answers, args.train_tokens, str(bench.reference.dtype))
    options = {"max_tokens": args.train_tokens, "seed": SEED, "kept": kept, "label": "answers to train on"}
    made = sample_rows(bench, bench.reference, asked, None, **options)
    groups = np.repeat(np.arange(args.train_prompts), args.answers)
    full = np.array([i for i, answer in enumerate(made) if answer.tokens])
    features = open_encoder(bench.base.path).encode([made[i].tokens for i in full])
    latents = within(bench.pack.encode(features), groups[full]).astype(np.float32)
    rendered = {question: list(bench.backend.render(user_prompt(question))) for question in set(asked)}
    return Corpus(
        prompts=[rendered[asked[i]] for i in full],
        answers=[made[i].tokens for i in full],
        latents=torch.from_numpy(latents),
        groups=groups[full],
        end=bench.eos,
        cap=args.train_tokens,
    )


def train(bench: Bench, decoder: Decoder, corpus: Corpus, *, rate: float, label: str) -> list[float]:
    """Adam on reconstruction and contrast; losses of every step in nats per answer."""
    args = bench.args
    groups = corpus.rows(held_out=False, n=args.answers)
    noise = torch.from_numpy(np.sqrt(bench.pack.variance))
    optimiser = torch.optim.Adam(decoder.parameters(), betas=(0.9, 0.95))
    rng, history = np.random.default_rng(args.seed), []
    with progress(label, args.steps) as tell:
        for step in range(args.steps):
            rows = np.concatenate([groups[g] for g in rng.choice(len(groups), args.batch, replace=False)])
            random = torch.Generator().manual_seed(int(rng.integers(2**62)))
            z = corpus.latents[rows]
            z = (z + noise * torch.randn(z.shape, generator=random)).view(args.batch, args.answers, -1)
            nll = decoder.bind(corpus.batch(rows, args.answers, decoder.front))
            own = nll(z.flatten(0, 1))
            other = nll(z.roll(int(rng.integers(1, args.answers)), 1).flatten(0, 1))
            loss = own.mean() + F.softplus(own - other).mean()
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / args.steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(float(loss.detach()))
            tell(step + 1)
    return history


@torch.no_grad()
def health(bench: Bench, decoder: Decoder, corpus: Corpus) -> dict[str, float]:
    """Nats per token of held-out answers under no latent, their own, and another answer's to the same prompt."""
    n = bench.args.answers
    sums, tokens = np.zeros(3), 0
    for rows in corpus.rows(held_out=True, n=n)[: bench.args.health_prompts]:
        batch, z = corpus.batch(rows, n, decoder.front), corpus.latents[rows]
        nll = decoder.bind(batch)
        sums += [float(nll(x).sum()) for x in (torch.zeros_like(z), z, z.roll(1, 0))]
        tokens += int((batch.length - batch.first).sum())
    return dict(zip(("none", "own", "swapped"), (sums / tokens).tolist(), strict=True))


def trained(bench: Bench, name: str, decoder: Any, corpus: Corpus, rate: float) -> dict[str, Any]:
    """Train it, or load what an earlier run trained; what it cost, and its health."""
    args = bench.args
    named = [getattr(args, key) for key in ("train_prompts", "answers", "train_tokens", "steps", "batch", "seed")]
    kept = bench.keep("slots-trained", name, rate, *named, args.blocks, bench.pack.hash)

    def work() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        seconds, history = timed(lambda: train(bench, decoder, corpus, rate=rate, label=f"{name} at {rate:g}"))
        return {"seconds": seconds, "loss": history}, {key: p.detach() for key, p in decoder.named_parameters()}

    cost, path = kept_training(kept, work)
    decoder.load_state_dict(load_file(path), strict=False)
    size = sum(part.numel() for part in decoder.parameters())
    found = {"rate": rate, "parameters": size, **cost, "health": health(bench, decoder, corpus)}
    console.print(f"{name} at {rate:g}: held out, nats per token {found['health']}")
    return found


# -- people --------------------------------------------------------------------------------------------------------
def answers_of(
    bench: Bench, decoder: Decoder, z: torch.Tensor, unseen: Sequence[str], name: str, label: str
) -> list[Answer]:
    """Answers under one latent."""
    args = bench.args
    model, array = decoder.model(z)
    kept = bench.keep("slots-answers", name, digest(z.numpy()), list(unseen), args.max_tokens, args.seed)
    vectors = None if array is None else np.broadcast_to(array, (len(unseen), *array.shape))
    return sample_rows(
        bench,
        model,
        list(unseen),
        vectors,
        max_tokens=args.max_tokens,
        seed=args.seed + SEED,
        kept=kept,
        before=[bench.eos] * decoder.front,
        label=label,
    )


def compare(
    bench: Bench, who: User, decoders: dict[str, tuple[Decoder, str]], probe: Probe, unseen: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for every decoder, at the KL of the shipped one at strength 1."""
    args = bench.args
    questions, answers = train_answers(bench)
    profile = learn_profile(bench, users_pairs(who, questions, answers, n=args.pairs, seed=args.seed))
    z = torch.from_numpy(profile.learnt.latents.mean(0) * profile.encoder.scale).float()
    base = sample_reference(bench, unseen, None, max_tokens=args.max_tokens, label="base answers")
    second = other_judges().get(who.name)
    rows: list[dict[str, Any]] = []
    target = 0.0
    for name, (decoder, depends) in decoders.items():

        def kl_at(factor: float, decoder: Decoder = decoder) -> float:
            model, array = decoder.model(factor * z)
            vectors = None if array is None else SteeringVectors(array)
            return measured_kl(ReferenceScorer(model, [bench.eos] * decoder.front), probe, vectors)

        factor, kl = (1.0, kl_at(1.0)) if not rows else search_factor(kl_at, target)
        target = target or kl
        made = answers_of(bench, decoder, factor * z, unseen, name + depends, f"{who.name}: {name}")
        row = judged(bench, who, list(unseen), made, base, second)
        rows.append({"user": who.name, "arm": name, "factor": factor, "kl": kl, "kl_at_zero": kl_at(0.0), **row})
        console.print(f"{who.name}, {name}: win {row['win_rate']:.2f}, nll x {row['nll_ratio']:.2f}, kl {kl:.3f}")
    return rows


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.train_prompts, args.answers, args.train_tokens, args.steps, args.health_prompts = 6, 2, 8, 2, 1
        args.batch, args.pairs, args.prompts, args.max_tokens, args.users = 1, 8, 2, 8, "casual"
    base = bench.reference
    corpus, layers = corpus_of(bench), other_blocks(bench)
    opening = bench.backend.render(user_prompt(prompts("pack")[0]))[:SLOTS]
    with torch.no_grad():
        _, outputs = base.hidden(torch.tensor([corpus.prompts[0] + corpus.answers[0]]), layers=layers)
    size, spread = torch.stack([x.float().abs().median() for x in outputs]), corpus.latents.std(0)
    found: dict[str, Any] = {"shipped": {}}
    decoders: dict[str, tuple[Any, str]] = {"shipped": (Shipped(base, bench.pack.decoder), bench.pack.hash)}
    made: dict[str, tuple[Callable[[], Any], str]] = {
        "added vectors": (lambda: Additive(base, spread, layers, size), args.rates),
        "key/value slots": (lambda: Slots(base, spread, opening), args.slot_rates),
    }
    for name, (fresh, rates) in made.items():
        tried = [(trained(bench, name, decoder := fresh(), corpus, float(rate)), decoder) for rate in rates.split(",")]
        cost, decoder = min(tried, key=lambda one: one[0]["health"]["own"])
        found[name] = cost | {"tried": {str(one["rate"]): one["health"] for one, _ in tried}}
        decoders[name] = (decoder, digest(*[part.detach().numpy() for part in decoder.parameters()]))
    unseen = list(prompts("validation")[: args.prompts])
    short = {"answers": 2, "tokens": 8} if args.quick else {}
    sampled = sampled_probe(bench.backend, seed=SEED, **short)
    probe = open_probe(ReferenceScorer(base), sampled.prompts, sampled.completions)
    rows = [row for who in chosen_users(args.users) for row in compare(bench, who, decoders, probe, unseen)]
    show(rows)
    keys = ("win_rate", "nll_ratio", "distinct2_ratio", "kl")
    summary = {arm: {key: np.mean([r[key] for r in rows if r["arm"] == arm]) for key in keys} for arm in decoders}
    return {"decoders": found, "answers": len(corpus.answers), "rows": rows, "summary": summary}


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("user", "decoder", "win", "nll x", "dist-2", "kl", "kl at 0", "factor")
    for row in rows:
        values = (row[key] for key in ("win_rate", "nll_ratio", "distinct2_ratio", "kl", "kl_at_zero", "factor"))
        table.add_row(row["user"], row["arm"], *(f"{value:.3f}" for value in values))
    console.print(table)


if __name__ == "__main__":
    p = parser("The paper's key/value slots against additive steering: same losses, same answers, same people.")
    users_option(p, "casual,formal,hedged,assertive")
    p.add_argument("--pairs", type=int, default=100)
    p.add_argument("--prompts", type=int, default=48, help="unseen validation prompts")
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--train-prompts", type=int, default=128, help="of the pack, with --answers answers each")
    p.add_argument("--answers", type=int, default=8)
    p.add_argument("--train-tokens", type=int, default=64, help="of each answer")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=2, help="prompts in a step")
    p.add_argument("--rates", default="3e-3", help="learning rates of the added vectors; the best on held-out answers")
    p.add_argument("--slot-rates", default="1e-3", help="of the slots")
    p.add_argument("--health-prompts", type=int, default=16, help="held-out prompts whose answers are scored")
    p.add_argument("--blocks", default="8,21", metavar="FIRST,LAST", help="that vectors are added to")
    main(run, p.parse_args(), __file__)
