"""What commands share: the global options, the options of sampling and of the engine, values from files and stdin."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TYPE_CHECKING, TypeVar

import click

from edge_align.config import default, RuntimeConfig, SamplingConfig
from edge_align.errors import InputError

if TYPE_CHECKING:
    from edge_align.assistant import Assistant
    from edge_align.home import Home

DEFAULT_PROFILE = "default"
FULL_STRENGTH = 1.0
VALUE_LIMIT = 8 << 20  # bytes of a text given as a file or on stdin; no context window holds a fraction of it

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class App:
    """What the global options said."""

    home_option: str | None = None
    json: bool = False

    @property
    def home(self) -> Home:
        from edge_align.home import Home

        return Home.find(self.home_option)


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(App).json = value


json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_json,
    help="One JSON document on stdout.",
    show_default=False,
)

model_option = click.option(
    "--model",
    metavar="ID|PATH",
    help="Base model: an id from `edge-align models list`, a GGUF file, or an ONNX export.",
)

engine_option = click.option(
    "--engine",
    type=click.Choice(["llamacpp", "onnx"]),
    help="Engine to run the base in.  [default: the one that reads its files]",
)


def profile_option(text: str, *, fallback: str | None = DEFAULT_PROFILE) -> Callable[[Command], Command]:
    """--profile; `fallback` None stands for the profile in use."""
    return click.option("--profile", metavar="NAME", default=fallback, help=text)


def sampling_options(function: Command) -> Command:
    """The options of SamplingConfig; the command gets `sampling`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any, max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int, **others: Any
    ) -> Any:
        sampling = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        return function(*args, sampling=sampling, **others)

    for name, kind, text in (
        ("seed", int, "Seed of the sampler; the same seed gives the same answer."),
        ("top_k", int, "Sample from this many likeliest tokens."),
        ("top_p", float, "Sample from the likeliest tokens of this total probability."),
        ("temperature", float, "Sampling temperature; 0 always takes the likeliest token."),
        ("max_tokens", int, "Most tokens of an answer."),
    ):
        flag = f"--{name.replace('_', '-')}"
        wrapper = click.option(flag, type=kind, default=default(SamplingConfig, name), help=text)(wrapper)
    return wrapper  # type: ignore[return-value]


RUNTIME = {
    "n_gpu_layers": ("--n-gpu-layers", "Blocks to run on the GPU, where the engine was built for one; -1 is all."),
    "n_threads": ("--threads", "Threads of the engine; 0 is one per physical core."),
    "n_ctx": ("--n-ctx", "Size of the context window in tokens."),
}


def _with_runtime(function: Command, names: tuple[str, ...]) -> Command:
    @functools.wraps(function)
    def wrapper(*args: Any, **given: Any) -> Any:
        runtime = RuntimeConfig(**{name: given.pop(name) for name in names})
        return function(*args, runtime=runtime, **given)

    for name in names:
        flag, text = RUNTIME[name]
        wrapper = click.option(flag, name, type=int, default=default(RuntimeConfig, name), help=text)(wrapper)
    return wrapper  # type: ignore[return-value]


def runtime_options(function: Command) -> Command:
    """The options of RuntimeConfig; the command gets `runtime`."""
    return _with_runtime(function, tuple(RUNTIME))


def threads_option(function: Command) -> Command:
    """--threads alone, for commands that generate nothing; the command gets `runtime`."""
    return _with_runtime(function, ("n_threads",))


def strength_option(function: Command) -> Command:
    """--strength, checked by the command through `config.check_strength`."""
    text = "How far to steer: 1 is as calibrated, 0 is the base."
    return click.option("--strength", type=float, default=FULL_STRENGTH, help=text)(function)


@contextmanager
def open_assistant(
    app: App,
    *,
    model: str | None,
    profile: str | None,
    use_profile: bool,
    runtime: RuntimeConfig,
    engine: str | None = None,
) -> Iterator[Assistant]:
    """An open base with a profile; what the person should know about the profile is said on stderr."""
    from edge_align.assistant import Assistant
    from edge_align.cli.output import say

    with Assistant.open(
        model=model, profile=profile, use_profile=use_profile, home=app.home, runtime=runtime, engine=engine
    ) as assistant:
        if assistant.profile is not None and assistant.profile.note:
            say(f"Note: {assistant.profile.note}")
        yield assistant


def stdin_bytes() -> BinaryIO:
    return sys.stdin.buffer


def read_value(value: str, *, name: str, files: bool = False) -> str:
    """The text an option or argument stands for: `-` is stdin and, with `files`, `@PATH` a file (`@@` a plain @).

    The last newline of a file or stdin is dropped. Raises InputError when it cannot be read, is not UTF-8 or longer
    than 8 MiB.
    """
    if value == "-":
        return _decoded(stdin_bytes().read(VALUE_LIMIT + 1), name=f"{name} on stdin")
    if not files or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    path = Path(value[1:])
    try:
        with path.open("rb") as file:
            data = file.read(VALUE_LIMIT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: {path} cannot be read: {why}") from None
    return _decoded(data, name=f"{name} in {path}")


def _decoded(data: bytes, *, name: str) -> str:
    if len(data) > VALUE_LIMIT:
        raise InputError(f"the {name} is longer than {VALUE_LIMIT >> 20} MiB")
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise InputError(f"the {name} is not UTF-8 text") from None


def confirm(question: str, *, yes: bool) -> None:
    """Go on only after --yes or a typed yes. Raises InputError where nobody can be asked, click.Abort after a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("this deletes data and needs a yes; repeat the command with --yes")
    if not click.confirm(question, err=True):
        raise InputError("nothing was changed")
