"""What the decoder's thread owns: an open base, and the profiles it has at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TYPE_CHECKING

import numpy as np

from edge_align.assistant import Assistant
from edge_align.bases import BaseModel, find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.engines import open_backend
from edge_align.errors import EdgeAlignError, InputError, PackMissing
from edge_align.home import Home
from edge_align.pack import LatentPack
from edge_align.profiles import ProfileStore
from edge_align.records import Prompt, SteeringVectors, user_prompt
from edge_align.registry import find_pack
from edge_align.runtime.base import Backend, Forking

if TYPE_CHECKING:
    from edge_align.runtime.activations import ActivationReader

RESIDENT = 64  # profiles kept open; each is a few kilobytes


@dataclass(frozen=True, slots=True)
class Steering:
    """What a profile adds for one prompt, and the version that says so."""

    version: int
    vectors: SteeringVectors | None


class Profiles(Protocol):
    """Where vectors come from. Used on the decoder's thread."""

    def steering(self, name: str, prompt: Prompt, strength: float) -> Steering | None:
        """None for a profile with no active version. Raises EdgeAlignError when it cannot be used."""
        ...


@dataclass(frozen=True)
class Engine:
    """One base. `base` is None for an engine without a model file."""

    backend: Backend
    profiles: Profiles
    base: BaseModel | None = None
    embed: Callable[[Sequence[int]], np.ndarray] | None = None  # token ids -> (d_model,) float32 of length 1


class Shelf:
    """Profiles of a home folder by name, each in its active version as of now; a swap touches no running answer."""

    def __init__(self, home: Home, base: BaseModel, backend: Backend, runtime: RuntimeConfig) -> None:
        self._home, self._base, self._backend, self._runtime = home, base, backend, runtime
        self._store = ProfileStore(home)
        self._open: OrderedDict[str, tuple[int, Assistant]] = OrderedDict()
        self._pack: LatentPack | None = None

    def steering(self, name: str, prompt: Prompt, strength: float) -> Steering | None:
        """Vectors of the active version of `name`, reread from disk when another one was activated."""
        if not self._store.has(name):
            return None
        active = self._store.active_version(name)
        if active is None:
            return None
        known = self._open.get(name)
        if known is None or known[0] != active:
            known = active, self._load(name)
            self._open[name] = known
        self._open.move_to_end(name)
        while len(self._open) > RESIDENT:
            self._open.popitem(last=False)
        assistant = known[1]
        assert assistant.profile is not None
        return Steering(assistant.profile.version, assistant.vectors(prompt, strength=strength))

    def _load(self, name: str) -> Assistant:
        with suppress(PackMissing):  # a profile that is vectors needs none; any other then says what is missing
            self._pack = self._pack or find_pack(self._base, self._home)
        assistant = Assistant(
            base=self._base, backend=self._backend, home=self._home, runtime=self._runtime, pack=self._pack
        )
        try:
            assistant.set_profile(name)
        except InputError as error:  # names every profile there is
            raise EdgeAlignError(str(error)) from error
        return assistant


class Embedder:
    """The mean of a text's hidden states two thirds up the base, made to length 1; a context of its own, on demand."""

    def __init__(self, base: BaseModel, runtime: RuntimeConfig) -> None:
        self._base, self._runtime = base, runtime
        self._reader: ActivationReader | None = None

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        """(d_model,) float32 of token ids, at least one. Raises InputError, ContextOverflow, BackendError."""
        from edge_align.runtime.activations import ActivationReader

        self._reader = self._reader or ActivationReader.open(self._base.path, config=self._runtime)
        (states,) = self._reader.hidden(tokens, [2 * self._base.n_layer // 3])
        mean = states.mean(0)
        vector: np.ndarray = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return vector


def opener(home: Home, model: str | None, runtime: RuntimeConfig) -> Callable[[], Engine]:
    """A function that opens the base in the engine that reads its files, ready for a first answer.

    An ONNX export makes no embeddings: its graph gives no hidden states.
    """

    def open_engine() -> Engine:
        base = find_base(model, home=home)
        backend = open_backend(base, runtime)
        with suppress(EdgeAlignError):  # what is wrong is told to whoever asks for an answer
            greeting = backend.render(user_prompt("Hello"))  # compiles the template
            list(backend.generate(greeting, vectors=None, sampling=SamplingConfig(max_tokens=1)))  # reads the weights
            if isinstance(backend, Forking):
                backend.forget_prompt()
        embed = Embedder(base, runtime) if base.export is None else None
        return Engine(backend, Shelf(home, base, backend, runtime), base, embed)

    return open_engine
