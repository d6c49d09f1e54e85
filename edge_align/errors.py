"""Every error edge-align raises on purpose, as one tree.

EdgeAlignError
├── InputError                 what the caller gave: a bad file, row, option, name; the CLI exits with code 2
│   ├── NothingUsable          feedback was read, but no row of it can be learnt from
│   └── ContextOverflow        the prompt does not fit the context window
├── ArtefactError              a file of ours or of a base model
│   ├── CorruptArtefact        damaged, truncated or not what its manifest says
│   ├── UnsupportedVersion     written by a newer edge-align
│   ├── IncompatibleBase       made for another base model; lists every mismatch
│   └── PackMissing            this base has no latent pack; names the command that builds one
├── StorageError               the disk: full, read-only, no permission, locked by another process
├── BackendError               an engine failed
│   ├── BackendUnavailable     the engine is not installed, or lacks the capability; names the extra
│   └── ModelLoadError         the engine cannot load this file
└── SessionClosed              use after close()

The library raises these and nothing else across its public border; the CLI turns each into one line.
"""


class EdgeAlignError(Exception):
    """Base of every error edge-align raises on purpose; ``str(error)`` is one line for a person."""

    exit_code = 1


class InputError(EdgeAlignError):
    """The caller's data or options are not usable."""

    exit_code = 2


class NothingUsable(InputError):
    """Feedback was read, but no row of it can be learnt from."""


class ContextOverflow(InputError):
    """The prompt does not fit the context window."""


class ArtefactError(EdgeAlignError):
    """A file of ours, or a base model's, cannot be used."""

    exit_code = 2


class CorruptArtefact(ArtefactError):
    """A file is damaged, truncated, or is not what its manifest says."""


class UnsupportedVersion(ArtefactError):
    """A file was written by a newer version of edge-align."""


class IncompatibleBase(ArtefactError):
    """A pack or profile was made for another base model; the message lists every mismatch."""


class PackMissing(ArtefactError):
    """The base model has no latent pack; the message names the command that builds one."""


class StorageError(EdgeAlignError):
    """The disk refused: full, read-only, no permission, or locked by another process."""

    exit_code = 2


class BackendError(EdgeAlignError):
    """An inference engine failed."""


class BackendUnavailable(BackendError):
    """An engine is not installed, or cannot do what was asked; the message names the remedy."""

    exit_code = 2


class ModelLoadError(BackendError):
    """The engine cannot load this model file."""

    exit_code = 2


class SessionClosed(EdgeAlignError):
    """An object was used after ``close()``."""
