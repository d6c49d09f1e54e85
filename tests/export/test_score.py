"""Scores are slopes of the naive model's log-probability, and their regression moves latents most for its KL."""

import numpy as np
import pytest
import torch
from reference import naive_llama as naive

from edge_align.config import RuntimeConfig
from edge_align.errors import IncompatibleBase, InputError
from edge_align.home import Home
from edge_align.pack import load_pack
from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.clap import ClapConfig, Corpus
from edge_align_export.linear import LinearConfig
from edge_align_export.pack import build_pack
from edge_align_export.score import first_order_gain, read_scores, solve_decoder, UNIT
from edge_align_export.texts import Answers
from scripts.tiny_models import write_gguf

LAYERS, EACH = range(1, 3), 4


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), EACH)
    said = [[int(token) for token in rng.integers(5, 15, size=rng.integers(2, 9))] for _ in groups]
    answers = Answers([str(i) for i in range(5)], [[int(g) + 1, 15, 16] for g in groups], said, groups)
    return Corpus(answers, np.zeros((len(groups), 3), np.float32), max_tokens=8, end=0)


def log_p(model: LlamaReference, corpus: Corpus, row: int, vectors: np.ndarray, tokens: int) -> float:
    """Log-probability of an answer's first tokens, its end included, all of them steered; float64 sums."""
    said = corpus.answers.completions[row]
    said = (said if len(said) >= corpus.max_tokens else [*said, corpus.end])[:tokens]
    logits = torch.from_numpy(model.score(corpus.answers.prompts[row], said, vectors)).double()
    return float(logits.log_softmax(1)[range(len(said)), said].sum())


@pytest.mark.parametrize("tokens", [3, 96])
def test_a_score_is_the_slope_of_the_log_probability(model, corpus, tmp_path, tokens):
    scores = read_scores(model, corpus, LAYERS, tokens=tokens, work=tmp_path, tell=lambda _: None)
    rng = np.random.default_rng(1)
    for row in (0, 7, 19):
        v = np.zeros((naive.LAYERS, naive.D), np.float32)
        v[list(LAYERS)] = rng.normal(size=(len(LAYERS), naive.D))
        step = np.float32(0.02)
        ends = [log_p(model, corpus, row, way * step * v, tokens) for way in (1, -1)]
        found = float(scores[row] @ v[list(LAYERS)].ravel())
        assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02, abs=0.01)


def test_scores_are_kept_and_read_again(model, corpus, tmp_path, monkeypatch):
    first = read_scores(model, corpus, LAYERS, tokens=4, work=tmp_path, tell=lambda _: None)
    monkeypatch.setattr("edge_align_export.score._scores", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(first, read_scores(model, corpus, LAYERS, tokens=4, work=tmp_path, tell=lambda _: None))


def synthetic(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of very unequal variance, of which latents are a noisy linear function; four answers a prompt."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(5).normal(size=(6, 6)) * np.array([3, 2, 1, 1, 0.3, 0.1])
    scores = rng.normal(size=(n, 6)) @ mixed.T
    latents = scores @ np.random.default_rng(6).normal(size=(6, 2)) + rng.normal(size=(n, 2))
    return scores.astype(np.float32), latents.astype(np.float32), np.arange(n) // 4


def test_no_other_direction_moves_a_latent_further_for_the_same_kl():
    scores, latents, groups = synthetic(4000, 0)
    decoder, gain = solve_decoder(scores, latents, groups, layers=range(1, 3), n_layer=4, ridge=1e-6, tokens=10.0)
    solved = decoder[:, [1, 2]].reshape(2, 6)
    assert not decoder[:, [0, 3]].any()

    def moved(v: np.ndarray, j: int) -> float:  # E[z g.v] for E[(g.v)^2] = 1
        effect = scores @ v
        return float((effect * latents[:, j]).mean() / np.sqrt((effect**2).mean()))

    rng = np.random.default_rng(2)
    for j in range(2):
        best = moved(solved[j], j)
        others = [
            moved(solved[j] + rng.normal(size=6) * np.abs(solved[j]).mean() * size, j)
            for size in (0.1, 0.5, 3.0)
            for _ in range(50)
        ]
        assert best > max(others) - 0.02 * best
        assert best > 1.02 * moved((scores * latents[:, j : j + 1]).mean(0), j)  # the plain gradient
    fresh, wanted, _ = synthetic(4000, 1)
    assert gain == pytest.approx(first_order_gain(solved, fresh, wanted), abs=0.03)
    kl = ((scores @ solved.T) ** 2).mean(0).sum() / 2 / 10.0
    assert kl * 3 / 4 == pytest.approx(UNIT * 2, rel=0.02)  # less a quarter, the prompts' means of four answers


def test_noise_gains_nothing_on_prompts_left_out():
    scores, latents, groups = synthetic(400, 3)
    shuffled = np.random.default_rng(4).permutation(latents)
    _, gain = solve_decoder(scores, shuffled, groups, layers=range(1, 3), n_layer=4, ridge=8.0, tokens=10.0)
    assert abs(gain) < 0.25


def test_a_pack_is_made_from_a_file_and_its_latents_stay_when_they_are_taken_over(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    home, one = Home(tmp_path / "home"), RuntimeConfig(n_threads=1, n_ctx=256)
    small = LinearConfig(
        k=8,
        metric_answers=3,
        metric_tokens=8,
        curve_points=6,
        loop_latents=2,
        loop_prompts=2,
        loop_tokens=4,
        base_draws=1,
    )
    kwargs = {"home": home, "model": str(path), "fast": True, "runtime": one, "config": small}
    made = [
        build_pack(**kwargs, recipe=recipe, out=tmp_path / name, readout=of)
        for recipe, name, of in (
            ("linear", "linear", None),
            ("score", "score", None),
            ("score", "again", tmp_path / "linear"),
        )
    ]
    linear, score, again = (load_pack(tmp_path / name) for name in ("linear", "score", "again"))
    for array in ("readout", "variance", "baseline", "prompt_projection", "feature_mean"):
        assert np.array_equal(getattr(linear, array), getattr(score, array))
        assert np.array_equal(getattr(linear, array), getattr(again, array))
    np.testing.assert_allclose(score.decoder, again.decoder, atol=1e-3 * np.abs(score.decoder).max())
    assert not np.allclose(score.decoder, linear.decoder, atol=1e-2)
    assert "first_order_gain" in made[1]["health"] and "first_order_gain" not in made[0]["health"]
    assert again.manifest["readout"]["pack_hash"] == linear.hash and score.manifest["readout"] is None
    assert linear.hash in (tmp_path / "again" / "README.md").read_text()
    clap = ClapConfig(steps=1, prompts=1, decoder_lr=1e-9)
    trained = build_pack(**kwargs, recipe="clap", out=tmp_path / "clap", readout=tmp_path / "again", clap=clap)
    begun = load_pack(tmp_path / "clap")  # training begins where recipe score ends, with the latents it was given
    np.testing.assert_allclose(begun.readout, linear.readout, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(begun.decoder, again.decoder, rtol=1e-3, atol=1e-5 * np.abs(again.decoder).max())
    assert {"first_order_gain", "nll_own_latent"} <= set(trained["health"])
    assert begun.manifest["readout"] == again.manifest["readout"]  # whoever had these latents first
    assert "1 steps of 1 prompts" in (tmp_path / "clap" / "README.md").read_text()
    other = write_gguf(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(IncompatibleBase):
        build_pack(**kwargs | {"model": str(other)}, recipe="score", readout=tmp_path / "linear")
    with pytest.raises(InputError, match="recipe linear makes latents of its own"):
        build_pack(**kwargs, readout=tmp_path / "linear")
