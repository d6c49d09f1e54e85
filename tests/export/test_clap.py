"""CLaP's losses are the textbook's, training lowers them, a stopped run ends the same, two processes make one pack."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import naive_llama as naive

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable, InputError
from edge_align.home import Home
from edge_align_export.clap import ClapConfig, Corpus, health_of, share_of, SHARES, start, train
from edge_align_export.clap_loss import aggregated_kl, FrozenDecoder, make_batch, mutual_information
from edge_align_export.curves import save_curves, smooth
from edge_align_export.linear import LinearPack, solve, within
from edge_align_export.pack import build_pack
from edge_align_export.texts import Answers
from scripts.tiny_models import write_gguf

ONE = RuntimeConfig(n_threads=1, n_ctx=256)
LAYERS, PROMPTS, EACH, K, N_FEATURE = range(1, 3), 10, 4, 3, 6


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """To each prompt, answers in which one of two tokens is common; the features say which, and something else."""
    rng = np.random.default_rng(0)
    prompts, answers, groups, features = [], [], [], []
    for group in range(PROMPTS):
        for i in range(EACH):
            style = i % 2
            prompts.append([group + 1, 15, 16])
            answers.append([int(token) for token in rng.choice([5 + style, 9], size=6, p=[0.8, 0.2])])
            groups.append(group)
            features.append([*rng.normal(size=N_FEATURE - 1), style * 2.0 - 1])
    made = Answers([str(group) for group in range(PROMPTS)], prompts, answers, np.array(groups))
    return Corpus(made, np.array(features, np.float32), max_tokens=8, end=0)


@pytest.fixture(scope="module")
def linear(corpus) -> LinearPack:
    rng = np.random.default_rng(1)
    deep = corpus.features @ rng.normal(size=(N_FEATURE, len(LAYERS) * naive.D))
    return solve(
        features=corpus.features,
        deep=deep.reshape(-1, len(LAYERS), naive.D).astype(np.float32),
        groups=corpus.answers.groups,
        prompt_features=rng.normal(size=(PROMPTS, 4)).astype(np.float32),
        layers=LAYERS,
        n_layer=naive.LAYERS,
        k=K,
        ridge=0.1,
        inputs=2,
    )


def alone() -> SimpleNamespace:
    """What `train` asks of an Accelerator with one process."""
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        is_main_process=True,
        prepare=lambda *objects: objects,
        backward=lambda loss: loss.backward(),
    )


CONFIG = ClapConfig(steps=12, prompts=2, answers=EACH, decoder_lr=0.05, readout_lr=0.01, warmup=2, save_every=4)


# -- losses --------------------------------------------------------------------------------------------------------
def test_the_kl_of_one_posterior_is_the_closed_form_of_two_normals():
    rng = torch.Generator().manual_seed(0)
    mean, variance, prior = torch.tensor([[[1.0, -0.5]]]), torch.tensor([0.5, 0.1]), torch.tensor([1.0, 2.0])
    found = np.mean([float(aggregated_kl(mean, variance, prior, rng)) for _ in range(400)])
    exact = 0.5 * (prior.log() - variance.log() + (variance + mean[0, 0] ** 2) / prior - 1).sum()
    assert found == pytest.approx(float(exact), abs=0.06)


def test_posteriors_that_together_look_like_the_prior_cost_less_than_each_does():
    """The paper's point: apart they may be as sharp as they like."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.linspace(-1.6, 1.6, 9)[None, :, None]
    variance, prior = torch.tensor([0.1]), torch.tensor([1.0])
    together = float(aggregated_kl(spread, variance, prior, rng))
    each = float((0.5 * (-variance.log() + variance + spread**2 - 1)).mean())
    assert together < 0.15 < 1.0 < each


def test_mutual_information_runs_from_nothing_to_the_log_of_the_number_of_answers():
    rng = torch.Generator().manual_seed(0)
    far = torch.arange(8.0)[None, :, None] * 100
    assert mutual_information(far, torch.ones(1), rng) == pytest.approx(math.log(8), abs=1e-4)
    assert mutual_information(far * 0, torch.ones(1), rng) == pytest.approx(0, abs=1e-4)


def test_nll_is_that_of_scoring_each_answer_alone(model, corpus):
    rows = np.arange(3 * EACH)
    batch = corpus.batch(rows, n=EACH, device=model.device)
    vectors = torch.from_numpy(np.random.default_rng(2).normal(size=(len(rows), len(LAYERS), naive.D))).float()
    found = FrozenDecoder(model, batch, LAYERS).nll(vectors)
    plain = FrozenDecoder(model, batch, LAYERS).nll(None)
    for i in rows:
        prompt, answer = corpus.answers.prompts[i], [*corpus.answers.completions[i], corpus.end]
        steering = np.zeros((naive.LAYERS, naive.D), np.float32)
        for given, wanted in ((vectors[i].numpy(), found[i]), (0.0, plain[i])):
            steering[list(LAYERS)] = given
            logits = torch.from_numpy(model.score(prompt, answer, steering))
            exact = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            assert float(wanted) == pytest.approx(float(exact), rel=1e-4)


def test_the_gradient_is_the_slope_of_the_loss(model, corpus, linear):
    clap = start(linear, corpus.features, LAYERS, share=0.5)
    batch = corpus.batch(np.arange(2 * EACH), n=EACH, device=model.device)
    frozen = FrozenDecoder(model, batch, LAYERS)

    def loss() -> torch.Tensor:
        return clap(frozen, batch, torch.Generator().manual_seed(3), contrast=1.0, spread_kl=1.0)["loss"]

    loss().backward()
    for parameter in (clap.decoder, clap.readout, clap.log_variance):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            before, step = parameter.clone(), 2e-3
            ends = []
            for way in (1, -1):
                parameter.copy_(before + way * step * direction)
                ends.append(float(loss()))
            parameter.copy_(before)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=0.02)


def test_an_answer_cut_short_gets_no_end_of_text(corpus):
    long = Corpus(corpus.answers, corpus.features, max_tokens=6, end=0)
    rows = np.arange(EACH)
    assert (long.batch(rows, n=EACH, device=torch.device("cpu")).length == 9).all()
    assert (corpus.batch(rows, n=EACH, device=torch.device("cpu")).length == 10).all()


def test_padding_changes_nothing():
    features = torch.zeros(2, 1)
    batch = make_batch([[1], [1, 2, 3]], [[4], [5, 6]], features, n=2)
    assert batch.tokens.tolist() == [[1, 4, 0, 0, 0], [1, 2, 3, 5, 6]]
    assert (batch.first.tolist(), batch.length.tolist()) == ([1, 3], [2, 5])


# -- training ------------------------------------------------------------------------------------------------------
def test_training_lowers_the_loss_and_makes_latents_tell_answers_apart(model, corpus, linear, tmp_path):
    told = []
    trained = train(model, corpus, linear, LAYERS, CONFIG, work=tmp_path, workers=alone(), tell=told.append)
    losses = [step["loss"] for step in trained.history]
    assert len(losses) == CONFIG.steps and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    assert told[-1] == 1.0 and told == sorted(told)
    assert trained.decoder.shape == linear.decoder.shape and not trained.decoder[:, 0].any()
    assert not np.allclose(trained.readout, linear.readout, rtol=1e-3)
    said = health_of(model, corpus, linear, LAYERS, tell=lambda done: None)
    assert set(said) == {
        "nll_none",
        "nll_own_latent",
        "nll_swapped_latent",
        "nll_at_share",
        "mutual_information",
        "active_latents",
    }


def test_a_decoder_alone_leaves_the_readout_as_it_was(model, corpus, linear, tmp_path):
    config = ClapConfig(steps=2, prompts=2, answers=EACH, decoder_lr=0.05)
    trained = train(model, corpus, linear, LAYERS, config, work=tmp_path, workers=alone(), tell=lambda done: None)
    np.testing.assert_allclose(trained.readout, linear.readout, rtol=1e-5, atol=1e-7)
    assert "kl" not in trained.history[0]


def test_a_stopped_run_goes_on_to_the_same_end(model, corpus, linear, tmp_path):
    (tmp_path / "a").mkdir()
    whole = train(model, corpus, linear, LAYERS, CONFIG, work=tmp_path / "a", workers=alone(), tell=lambda done: None)

    class Stopped(Exception):
        pass

    def stop(done: float) -> None:
        if done > 0.5:
            raise Stopped

    (tmp_path / "b").mkdir()
    with pytest.raises(Stopped):
        train(model, corpus, linear, LAYERS, CONFIG, work=tmp_path / "b", workers=alone(), tell=stop)
    first = []
    after = train(model, corpus, linear, LAYERS, CONFIG, work=tmp_path / "b", workers=alone(), tell=first.append)
    assert first[0] == pytest.approx(5 / 12)  # 4 steps were kept
    np.testing.assert_allclose(after.decoder, whole.decoder, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.readout, whole.readout, rtol=1e-5, atol=1e-7)
    assert after.history == whole.history


def test_training_begins_at_the_pack_and_hands_it_back_in_its_own_units(model, corpus, linear, tmp_path):
    still = ClapConfig(steps=1, prompts=2, answers=EACH, decoder_lr=1e-9)
    trained = train(model, corpus, linear, LAYERS, still, work=tmp_path, workers=alone(), tell=lambda done: None)
    np.testing.assert_allclose(trained.decoder, linear.decoder, rtol=1e-4, atol=1e-8)


def test_the_share_is_the_one_under_which_answers_are_likeliest(model, corpus, linear):
    rows = np.arange(2 * EACH)
    groups = [rows[:EACH], rows[EACH:]]
    found = share_of(model, corpus, linear, LAYERS, groups)
    latents = within(corpus.features, corpus.answers.groups) @ linear.readout

    def nll(share: float) -> float:
        total = 0.0
        for i in rows:
            steering = share * np.einsum("k,kld->ld", latents[i], linear.decoder)
            said = [*corpus.answers.completions[i], corpus.end]
            logits = torch.from_numpy(model.score(corpus.answers.prompts[i], said, steering.astype(np.float32)))
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"))
        return total

    at = SHARES.index(found)
    assert all(nll(found) <= nll(share) for share in SHARES[max(0, at - 1) : at + 2])


def test_prompts_with_too_few_answers_are_left_out(corpus):
    few = Answers(
        corpus.answers.questions, corpus.answers.prompts[2:], corpus.answers.completions[2:], corpus.answers.groups[2:]
    )
    cut = Corpus(few, corpus.features[2:], max_tokens=8, end=0)
    assert len(cut.rows(held_out=True, n=EACH)) == 1 and len(cut.rows(held_out=False, n=EACH)) == 8


def test_too_few_answers_to_train_on_are_an_error_that_says_how_many(model, corpus, linear, tmp_path):
    config = ClapConfig(steps=1, prompts=PROMPTS, answers=EACH)
    with pytest.raises(InputError, match="8 prompts have 4 answers to train on; a step needs 10"):
        train(model, corpus, linear, LAYERS, config, work=tmp_path, workers=alone(), tell=lambda done: None)


# -- what is written -----------------------------------------------------------------------------------------------
def test_the_curves_are_smooth_means_of_the_past_and_the_picture_is_one(tmp_path):
    np.testing.assert_allclose(smooth(np.array([1.0, 3.0, 5.0, 7.0]), share=0.5), [1, 2, 4, 6])
    save_curves(tmp_path, [{"reconstruction": 2.0 - i / 9, "contrast": 0.5, "loss": 3.0} for i in range(9)])
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((tmp_path / "training.json").read_text())["history"]) == 9


def test_two_processes_train_one_pack(tmp_path):
    """Through `accelerate launch`, as the documentation says it; the main one alone writes and prints."""
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "edge_align.cli.main", "export", "pack", "--model", str(path), "--recipe", "clap", "--fast"]
    command += ["--steps", "3", "--batch", "1", "--threads", "1", "--out", str(tmp_path / "pack"), "--json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)  # one document: the other process says nothing
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert report["pack"] == str(tmp_path / "pack") and manifest["recipe"] == "clap-fast"
    assert len(json.loads((tmp_path / "pack" / "training.json").read_text())["history"]) == 3


def test_a_base_that_pytorch_does_not_compute_is_refused(tmp_path):
    path = write_gguf(tmp_path / "gemma.gguf", "gemma")
    with pytest.raises(BackendUnavailable, match="use linear"):
        build_pack(home=Home(tmp_path / "home"), model=str(path), recipe="clap", fast=True, runtime=ONE)


def test_groups_are_centred_as_the_linear_recipe_centres_them(corpus, linear):
    clap = start(linear, corpus.features, LAYERS, share=1.0)
    found = clap.mean(torch.from_numpy(corpus.features), EACH).reshape(-1, K)
    wanted = within(corpus.features, corpus.answers.groups) @ linear.readout
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-4)
