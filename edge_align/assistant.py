"""`Assistant`: an open base model with a person's profile. The CLI and other programs call only this to get answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, UTC
from types import TracebackType
from typing import Self

from edge_align.bases import BaseModel, find_base
from edge_align.config import check_strength, RuntimeConfig, SamplingConfig
from edge_align.encoder import PreferenceEncoder, profile_vectors
from edge_align.engines import open_backend
from edge_align.errors import InputError
from edge_align.home import Home
from edge_align.pack import LatentPack
from edge_align.personalize import personalize, PersonalizeConfig, PersonalizeReport, Progress
from edge_align.profiles import ProfileStore
from edge_align.records import (
    Completion,
    FeedbackRow,
    GenerationChunk,
    join_chunks,
    Origin,
    Prompt,
    SteeringVectors,
    user_prompt,
)
from edge_align.registry import open_profile
from edge_align.runtime.base import Backend
from edge_align.store import FeedbackLog

DEFAULT_PROFILE = "default"


@dataclass(frozen=True)
class LoadedProfile:
    """A profile version in use. `note` says why it is not the active version, when it is not."""

    name: str
    version: int
    scale: float
    predicted_kl: float
    encoder: PreferenceEncoder | None = None  # None: the profile holds steering vectors, not a latent
    note: str | None = None


class Assistant:
    """An open base and, where there is one, a profile. One owner, one thread at a time; a context manager.

    Without a profile, with strength 0 or `steered=False`, answers are exactly the base's.
    """

    def __init__(
        self,
        *,
        base: BaseModel,
        backend: Backend,
        home: Home,
        runtime: RuntimeConfig,
        model: str | None = None,
        pack: LatentPack | None = None,
    ) -> None:
        """pack: the base's latent pack, where it is open already."""
        self.base = base
        self._model = model  # as it was asked for, so that reports name it the same way
        self.profile: LoadedProfile | None = None
        self._backend = backend
        self._home = home
        self._runtime = runtime
        self._pack = pack
        self._vectors: SteeringVectors | None = None  # of a constant profile at strength 1
        self._log_name = DEFAULT_PROFILE

    @classmethod
    def open(
        cls,
        *,
        model: str | None = None,
        profile: str | None = None,
        use_profile: bool = True,
        home: Home | None = None,
        runtime: RuntimeConfig | None = None,
        engine: str | None = None,
    ) -> Self:
        """Open a base (None: the default one) and a profile (None: the one in use, if it has an active version).

        engine: "llamacpp" or "onnx"; None: whichever reads the base's files. Raises InputError (unknown model or
        profile, an engine that does not read the base), BackendUnavailable, ModelLoadError, IncompatibleBase,
        CorruptArtefact, PackMissing.
        """
        home = home or Home.find()
        runtime = runtime or RuntimeConfig()
        base = find_base(model, home=home)
        assistant = cls(
            base=base, backend=open_backend(base, runtime, engine=engine), home=home, runtime=runtime, model=model
        )
        try:
            if use_profile:
                assistant._open_profile(profile)
        except BaseException:
            assistant.close()
            raise
        return assistant

    def _open_profile(self, name: str | None) -> None:
        if name is not None:
            self.set_profile(name)
            return
        store = ProfileStore(self._home)
        current = store.current()
        if current is not None and store.has(current) and store.active_version(current) is not None:
            self.set_profile(current)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine back. Safe to call again; answering afterwards raises SessionClosed."""
        self._backend.close()

    @property
    def backend(self) -> Backend:
        return self._backend

    # -- profile ---------------------------------------------------------------------------------------------------
    def set_profile(self, name: str | None) -> None:
        """Answer with the active version of a profile, or with the base (None). Takes effect with the next answer.

        Raises InputError, IncompatibleBase, CorruptArtefact, PackMissing; the profile before stays in force then.
        """
        if name is None:
            self.profile, self._vectors = None, None
            return
        usable, pack = open_profile(ProfileStore(self._home), name, self.base, self._home, pack=self._pack)
        encoder = None
        if pack is None:
            vectors: SteeringVectors | None = profile_vectors(usable.tensors)
        else:
            encoder = PreferenceEncoder.from_tensors(usable.tensors)
            vectors = None if encoder.depends_on_prompt else pack.decode(encoder.latent())
            self._pack = pack
        self.profile = LoadedProfile(
            name=name,
            version=usable.version,
            scale=float(usable.tensors["scale"][0]),
            predicted_kl=float(usable.manifest.get("predicted_kl", 0.0)),
            encoder=encoder,
            note=usable.reason,
        )
        self._log_name = name
        self._vectors = vectors

    def vectors(self, prompt: Prompt, *, strength: float = 1.0) -> SteeringVectors | None:
        """What the profile adds to the hidden states for this prompt; None where that is nothing."""
        check_strength(strength)
        if self.profile is None or strength == 0.0:
            return None
        vectors = self._vectors
        if vectors is None:
            assert self._pack is not None and self.profile.encoder is not None
            from edge_align.features import embedding_table, prompt_features

            tokens = self._backend.tokenize(prompt[-1].content) or [0]
            described = prompt_features(embedding_table(self.base), [tokens])
            vectors = self._pack.decode(self.profile.encoder.latent(self._pack.head_inputs(described)[0]))
        if strength != 1.0:
            vectors = vectors.scaled(strength)
        return None if vectors.is_zero else vectors

    # -- answers ---------------------------------------------------------------------------------------------------
    def stream(
        self,
        prompt: str | Prompt,
        *,
        sampling: SamplingConfig | None = None,
        strength: float = 1.0,
        steered: bool = True,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[GenerationChunk]:
        """Answer `prompt` (a question, or a conversation that ends with one) as it is decoded.

        Raises InputError, ContextOverflow, BackendError, SessionClosed.
        """
        conversation = user_prompt(prompt) if isinstance(prompt, str) else prompt
        if not conversation or not conversation[-1].content.strip():
            raise InputError("the prompt is empty")
        vectors = self.vectors(conversation, strength=strength) if steered else None
        tokens = self._backend.render(conversation)
        return self._backend.generate(
            tokens, vectors=vectors, sampling=sampling or SamplingConfig(), cancelled=cancelled
        )

    def answer(
        self,
        prompt: str | Prompt,
        *,
        sampling: SamplingConfig | None = None,
        strength: float = 1.0,
        steered: bool = True,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion:
        """The whole answer of `stream`."""
        chunks = self.stream(prompt, sampling=sampling, strength=strength, steered=steered, cancelled=cancelled)
        return join_chunks(list(chunks))

    # -- feedback --------------------------------------------------------------------------------------------------
    def rate(self, prompt: Prompt, completion: str, up: bool) -> None:
        """Log a thumb up or down. Raises InputError, StorageError."""
        self._log(FeedbackRow(prompt, completion=completion, label=up, origin="thumb"))

    def prefer(self, prompt: Prompt, chosen: str, rejected: str, *, origin: Origin) -> None:
        """Log that `chosen` is the better answer. Raises InputError, StorageError."""
        self._log(FeedbackRow(prompt, chosen=chosen, rejected=rejected, origin=origin))

    def _log(self, row: FeedbackRow) -> None:
        stamped = replace(row, ts=datetime.now(UTC).isoformat(), model=self.base.id)
        with FeedbackLog(self._home) as log:
            log.append(self._log_name, [stamped])

    def learn(self, *, config: PersonalizeConfig | None = None, progress: Progress | None = None) -> PersonalizeReport:
        """Learn anew from everything logged for this profile, and answer with the new version if it was activated."""
        report = personalize(
            home=self._home,
            profile=self._log_name,
            model=self._model,
            config=config,
            runtime=self._runtime,
            progress=progress,
        )
        if report.activated:
            self.set_profile(self._log_name)
        return report
