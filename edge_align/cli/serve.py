"""`edge-align serve`: a local server for desktop assistants."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from edge_align.cli.options import App, engine_option, json_option, model_option, profile_option, runtime_options
from edge_align.cli.output import emit_json, say
from edge_align.config import default, RuntimeConfig, ServerConfig
from edge_align.errors import BackendUnavailable, InputError, StorageError


@click.command("serve")
@click.option("--host", default=default(ServerConfig, "host"), help="Address to listen on; others need --api-key-file.")
@click.option("--port", type=int, default=default(ServerConfig, "port"), help="Port to listen on; 0 takes a free one.")
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Require a key of this file (KEY [PROFILE ...] a line); made with one new key where it is missing.",
)
@profile_option("Profile to answer with when a request names none.  [default: the one in use]", fallback=None)
@click.option("--no-profile", is_flag=True, show_default=False, help="Answer as the base when a request names none.")
@click.option(
    "--learn",
    type=click.Choice(("auto", "manual", "off")),
    default=default(ServerConfig, "learn"),
    help="Refit a profile after every few verdicts, when asked to, or never.",
)
@click.option(
    "--learn-every", type=int, default=default(ServerConfig, "learn_every"), help="New verdicts before a refit."
)
@click.option("--origin", "origins", multiple=True, metavar="URL", help="Web page that may call, beside local ones.")
@click.option("--host-name", "hosts", multiple=True, metavar="NAME", help="Name the server may be reached under.")
@click.option(
    "--slots", type=int, default=default(ServerConfig, "slots"), help="Answers decoded in turns; each costs memory."
)
@click.option(
    "--keep-days", type=int, default=default(ServerConfig, "keep_days"), help="Days an answer is kept for feedback."
)
@model_option
@engine_option
@runtime_options
@json_option
@click.pass_obj
def command(
    app: App,
    host: str,
    port: int,
    api_key_file: Path | None,
    profile: str | None,
    no_profile: bool,
    learn: str,
    learn_every: int,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    slots: int,
    keep_days: int,
    model: str | None,
    engine: str | None,
    runtime: RuntimeConfig,
) -> None:
    """Answer desktop assistants, and learn from their thumbs.

    Serves the base and its profiles to the programs on this machine, over OpenAI's API and Ollama's. Verdicts that are
    sent to /v1/feedback are learnt from while it runs. Ends with Ctrl-C; docs/server.md has the routes.
    """
    if profile is not None and no_profile:
        raise InputError("--no-profile cannot be combined with --profile; drop one of them")
    from edge_align.bases import find_base
    from edge_align.engines import check_engine
    from edge_align.profiles import ProfileStore
    from edge_align.server.engine import opener
    from edge_align.server.keys import check_reach, Keys, LOOPBACK

    home = app.home
    check_engine(find_base(model, home=home), engine)  # a wrong --model is said at once
    if profile is None and not no_profile:
        profile = ProfileStore(home).current()
    config = ServerConfig(
        host=host,
        port=port,
        profile=profile,
        learn=learn,
        learn_every=learn_every,
        slots=slots,
        keep_days=keep_days,
        origins=origins,
        hosts=hosts,
    )
    keys = Keys() if api_key_file is None else Keys.load(api_key_file)
    check_reach(host, keys)
    loading = ThreadPoolExecutor(1).submit(opener(home, model, runtime))  # while the rest is imported
    try:
        import uvicorn

        from edge_align.server.app import create_app
        from edge_align.server.listen import listen, log_to_stderr, settings
    except ImportError as error:
        raise BackendUnavailable(f'the server needs {error.name}; run: pip install "edge-align[serve]"') from None

    served = create_app(home=home, model=model, config=config, keys=keys, open_engine=loading.result)
    try:
        listener = listen(host, port)
    except OSError as error:
        raise StorageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --port"
        ) from None
    with listener:
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        if app.json:
            emit_json({"host": host, "port": port, "url": f"http://{shown}:{port}", "profile": profile})
        say(f"Listening on http://{shown}:{port} (OpenAI's API under /v1, Ollama's under /api); Ctrl-C ends it.")
        if host not in LOOPBACK:
            say("Warning: others can reach it, and nothing is encrypted; put it behind a proxy with TLS.")
        log_to_stderr()
        uvicorn.Server(settings(served, config)).run(sockets=[listener])
