"""From feedback files to a profile: read, encode, fit, calibrate, save (docs/design.md has the picture)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TYPE_CHECKING

from edge_align.bases import BaseModel, find_base
from edge_align.config import PersonalizeConfig, RuntimeConfig
from edge_align.engines import check_engine
from edge_align.errors import ArtefactError, InputError, NothingUsable
from edge_align.feedback.read import read_feedback
from edge_align.home import Home
from edge_align.pack import LatentPack
from edge_align.pairs import build, count_by_origin, Dataset
from edge_align.profiles import ProfileStore
from edge_align.records import DroppedRow, FeedbackRow, PreferencePair, Rating
from edge_align.registry import find_pack, open_profile
from edge_align.store import FeedbackLog

if TYPE_CHECKING:
    from edge_align.latent_dpo import LatentFeedback

NEWEST = 2_000
"""Rows trained on; a longer log is trained on its newest rows, and the report says so."""

DROPPED_KEPT = 1_000
"""Dropped rows listed in a report; more are only counted."""

MIN_ROWS = 8
"""Below this many pairs and ratings the state is "collecting"."""

Progress = Callable[[str, float], None]
"""Told the stage's name and the fraction of it that is done."""


@dataclass(frozen=True, slots=True)
class Source:
    """A feedback file: its name in messages, and the path or binary stream to read."""

    name: str
    open: Path | BinaryIO


@dataclass(slots=True)
class RowCounts:
    """Filled while rows stream by. `dropped_more`: dropped rows beyond those listed."""

    read: int = 0
    used: int = 0
    duplicates: int = 0
    dropped: list[DroppedRow] = field(default_factory=list)
    dropped_more: int = 0


@dataclass(frozen=True, slots=True)
class PersonalizeReport:
    """What `personalize` did. heldout: see `gate.HeldOut`; scale and predicted_kl are None when nothing was fitted."""

    profile: str
    version: int | None
    model: str
    state: str  # "learnt", "refused", "collecting"
    rows: dict[str, Any]
    pairs: dict[str, int]
    ratings: int
    heldout: dict[str, Any] | None
    reliability: float | None
    depends_on_prompt: bool
    outside_support: float | None
    scale: float | None
    predicted_kl: float | None
    nll_ratio: float | None
    collision_ratio: float | None
    stages_sec: dict[str, float]
    profile_bytes: int
    activated: bool
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stages:
    """Wall-clock seconds per stage, and progress on the way."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        start = time.perf_counter()
        tell = self._progress or (lambda _name, _done: None)
        tell(name, 0.0)
        try:
            yield lambda done: tell(name, min(1.0, done))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        tell(name, 1.0)


def personalize(
    *,
    home: Home,
    sources: Sequence[Source] = (),
    profile: str = "default",
    model: str | None = None,
    user: str | None = None,
    config: PersonalizeConfig | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
    engine: str | None = None,
) -> PersonalizeReport:
    """Log the feedback in `sources`, learn from the whole log of `profile`, save a version, activate it if it passes.

    engine: "llamacpp" or "onnx", which must be the one that reads the base's files; None: whichever does.
    Raises NothingUsable when neither the files nor the log hold a usable row; InputError, ArtefactError,
    StorageError, BackendError. Rows logged before an error stay logged.
    """
    config = config or PersonalizeConfig()
    base = find_base(model, home=home)
    check_engine(base, engine)
    pack = find_pack(base, home)  # before any row is read: without it nothing can be learnt
    stages = Stages(progress)
    store = ProfileStore(home)
    with home.lock(profile):
        with stages.stage("read"), FeedbackLog(home) as log:
            counts = import_feedback(log, profile, sources, user=user)
            total = log.count(profile)
            logged = [*log.rows(profile, newest=NEWEST)]
            dataset = build(logged)
        n_rows = len(dataset.pairs) + len(dataset.ratings)
        if not n_rows:
            raise NothingUsable(_nothing(sources, counts, profile))
        rows: dict[str, Any] = {
            "read": counts.read,
            "used": counts.used,
            "duplicates": counts.duplicates,
            "dropped": [asdict(row) for row in counts.dropped],
            "dropped_more": counts.dropped_more,
            "logged": total,
            "trained_on": min(total, NEWEST),
        }
        common: dict[str, Any] = {
            "profile": profile,
            "model": base.id,
            "rows": rows,
            "pairs": {str(origin): n for origin, n in count_by_origin(dataset.pairs).items()},
            "ratings": len(dataset.ratings),
        }
        if n_rows < MIN_ROWS and not config.force:
            return PersonalizeReport(
                **common,
                version=None,
                state="collecting",
                heldout=None,
                reliability=None,
                depends_on_prompt=False,
                outside_support=None,
                scale=None,
                predicted_kl=None,
                nll_ratio=None,
                collision_ratio=None,
                stages_sec=stages.seconds,
                profile_bytes=0,
                activated=False,
                reason=f"{n_rows} verdicts so far; learning starts at {MIN_ROWS}: {MIN_ROWS - n_rows} more are needed",
            )

        from edge_align.learning import calibrate, Checked, encode_dataset, keep_fluent, learn

        with stages.stage("encode") as tell:
            feedback = encode_dataset(base, pack, dataset, runtime=runtime, tell=tell)
        with stages.stage("fit"):
            learnt = learn(pack, feedback, seed=config.seed)
        with stages.stage("calibrate"):
            encoder, predicted = calibrate(pack, learnt, kl_budget=config.kl_budget)
        checked = Checked(encoder, predicted)
        if config.nll_limit or config.collision_limit:
            with stages.stage("check") as tell:
                checked = keep_fluent(base, pack, learnt, encoder, config=config, runtime=runtime, tell=tell)
        encoder, predicted = checked.encoder, checked.predicted_kl
        scale = encoder.scale
        passed = learnt.heldout.passes and scale > 0.0
        worse = None
        if config.no_worse:
            with stages.stage("compare"):
                worse = _worse_than_active(store, profile, base, pack, feedback, logged, total, seed=config.seed)
        with stages.stage("save"):
            saved = store.save(
                profile,
                encoder.to_tensors(),
                {
                    "base_hash": base.hash,
                    "base": base.id,
                    "pack_hash": pack.hash,
                    "n_layer": pack.n_layer,
                    "d_model": pack.d_model,
                    "k": pack.k,
                    "kl_budget": config.kl_budget,
                    "predicted_kl": round(predicted, 6),
                    "nll_ratio": rounded(checked.nll_ratio),
                    "collision_ratio": rounded(checked.collision_ratio),
                    "reliability": round(learnt.reliability, 4),
                    "heldout": {key: round(value, 4) for key, value in asdict(learnt.heldout).items()},
                    "pairs": len(dataset.pairs),
                    "ratings": len(dataset.ratings),
                    "logged": total,
                    "seed": config.seed,
                },
            )
            retired = _retired(store, profile, pack, learnt.heldout.p) if config.no_worse and not config.force else None
            activated = config.activate and ((passed and worse is None) or config.force)
            if activated:
                store.activate(profile, saved.number)
                if config.use:
                    store.use(profile)
        return PersonalizeReport(
            **common,
            version=saved.number,
            state="learnt" if passed else "refused",
            heldout=learnt.heldout.to_dict(),
            reliability=learnt.reliability,
            depends_on_prompt=encoder.depends_on_prompt,
            outside_support=learnt.outside_support,
            scale=scale,
            predicted_kl=predicted,
            nll_ratio=checked.nll_ratio,
            collision_ratio=checked.collision_ratio,
            stages_sec=stages.seconds,
            profile_bytes=store.size_bytes(profile, saved.number),
            activated=activated,
            reason=retired
            or worse
            or _reason(passed=passed, config=config, more=learnt.heldout.more_rows(), total=total, scale=scale),
        )


def _worse_than_active(
    store: ProfileStore,
    profile: str,
    base: BaseModel,
    pack: LatentPack,
    feedback: LatentFeedback,
    logged: Sequence[FeedbackRow],
    total: int,
    *,
    seed: int,
) -> str | None:
    """Why the version that is being learnt should not replace the active one; None where it may."""
    import numpy as np

    from edge_align.encoder import PreferenceEncoder
    from edge_align.learning import compare_with

    if not store.has(profile) or store.active_version(profile) is None:
        return None
    usable = store.load_usable(profile, expect={"base_hash": base.hash})
    if usable.manifest.get("pack_hash") != pack.hash:
        return None  # imported vectors, or latents of another pack: nothing to compare with
    seen = len(logged) - max(0, total - int(usable.manifest.get("logged", 0)))
    old, now = build(logged[: max(0, seen)]), build(logged)
    known: set[PreferencePair | Rating] = {*old.pairs, *old.ratings}
    new = np.array([row not in known for row in (*now.pairs, *now.ratings)], dtype=bool)
    if not new.any():
        return None
    refit, active = compare_with(pack, feedback, PreferenceEncoder.from_tensors(usable.tensors), new, seed=seed)
    if refit >= active:
        return None
    return (
        f"not activated: it predicts {refit:.0%} of {int(new.sum())} new verdicts and version {usable.version}, "
        f"which stays active, {active:.0%}"
    )


def _retired(store: ProfileStore, profile: str, pack: LatentPack, p: float) -> str | None:
    """Switch off the active version if it was learnt, passed the gate, and p of all verdicts is that of chance; what
    is said of it then.
    """
    from edge_align.gate import GATE_P, RETIRE_P

    if p <= RETIRE_P or (number := store.active_version(profile)) is None:
        return None
    try:
        _, manifest = store.load(profile, number)
    except ArtefactError:
        return None  # damaged: `load_usable` falls back, and says so
    learnt = manifest.get("heldout")
    if manifest.get("pack_hash") != pack.hash or not isinstance(learnt, dict) or not learnt.get("p", 1.0) <= GATE_P:
        return None  # imported, of another pack, or switched on by force
    store.retire(profile)
    return (
        f"version {number} is switched off: all verdicts together cannot be told from chance (p {p:.2f}); "
        f"`edge-align profiles undo {profile}` brings it back"
    )


def import_feedback(log: FeedbackLog, profile: str, sources: Sequence[Source], *, user: str | None) -> RowCounts:
    """Stream the rows of `sources` into the log. Raises InputError for a file that cannot be read as a whole."""
    counts = RowCounts()
    counts.duplicates = log.append(profile, usable_rows(sources, counts, user=user)).duplicates
    return counts


def usable_rows(sources: Sequence[Source], counts: RowCounts, *, user: str | None) -> Iterator[FeedbackRow]:
    """The usable rows of `sources`, streamed; `counts` is kept up to date. Raises as `read_feedback` does."""
    for source in sources:
        for item in read_feedback(source.open, name=source.name, user=user):
            counts.read += 1
            if isinstance(item, FeedbackRow):
                counts.used += 1
                yield item
            elif len(counts.dropped) < DROPPED_KEPT:
                counts.dropped.append(item)
            else:
                counts.dropped_more += 1


def evaluate(
    *,
    home: Home,
    sources: Sequence[Source],
    profile: str | None = None,
    model: str | None = None,
    user: str | None = None,
    runtime: RuntimeConfig | None = None,
) -> dict[str, Any]:
    """How often a profile prefers the chosen answer in feedback it never saw. Nothing is logged.

    Raises NothingUsable when the files hold no pair.
    """
    from edge_align.encoder import PreferenceEncoder
    from edge_align.learning import encode_dataset, preference_accuracy

    base = find_base(model, home=home)
    store = ProfileStore(home)
    name = profile or store.current()
    if name is None:
        raise InputError("there is no profile to test; make one with `edge-align personalize`")
    usable, pack = open_profile(store, name, base, home)
    if pack is None:
        raise InputError(
            f"profile {name} holds imported vectors, not a latent that could judge an answer; test another"
        )
    counts = RowCounts()
    dataset = Dataset(pairs=build(usable_rows(sources, counts, user=user)).pairs[:NEWEST], ratings=())
    if not dataset.pairs:
        raise NothingUsable(_nothing(sources, counts, name))
    feedback = encode_dataset(base, pack, dataset, runtime=runtime)
    return {
        "profile": name,
        "version": usable.version,
        "model": base.id,
        "rows": {
            "read": counts.read,
            "used": len(dataset.pairs),
            "dropped": [asdict(row) for row in counts.dropped],
            "dropped_more": counts.dropped_more,
        },
        "heldout": preference_accuracy(PreferenceEncoder.from_tensors(usable.tensors), feedback),
    }


def _nothing(sources: Sequence[Source], counts: RowCounts, profile: str) -> str:
    if not sources:
        return f"profile {profile} has no feedback yet; give some with --feedback FILE, or run `edge-align compare`"
    first = counts.dropped[0] if counts.dropped else None
    why = f"; the first problem: {first.file}:{first.line}: {first.reason}" if first else ""
    return f"none of the {counts.read} rows in {', '.join(s.name for s in sources)} can be used{why}"


def rounded(value: float | None) -> float | None:
    """To what a manifest keeps."""
    return None if value is None else round(value, 4)


def _reason(*, passed: bool, config: PersonalizeConfig, more: int | None, total: int, scale: float) -> str | None:
    parts = []
    if not passed:
        need = f"about {more} more verdicts may settle it" if more is not None else "there is no pattern in them yet"
        parts.append(f"the verdicts cannot be told from chance; {need}")
        if config.force and config.activate:
            parts.append("activated all the same (--force)")
    elif not config.activate:
        parts.append("not activated (--no-activate)")
    if scale == 0.0:
        parts.append("the verdicts on different prompts do not agree on a direction, so it does not steer yet")
    if total > NEWEST:
        parts.append(f"trained on the newest {NEWEST:,} of {total:,} rows")
    return "; ".join(parts) or None


__all__ = ["BaseModel", "evaluate", "personalize", "PersonalizeConfig", "PersonalizeReport", "Progress", "Source"]
