"""Profiles on disk: numbered versions that are never changed, and which of them is active.

    profiles/<name>/v0001/encoder.safetensors    the preference encoder
    profiles/<name>/v0001/manifest.json          written last: a version without it does not exist
    profiles/<name>/active.json                  the versions that were activated, the active one last
    state.json                                   the profile in use

Everything is read with suspicion: checksums, dtypes, shapes, finite values, no symbolic links.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, UTC
from pathlib import Path
from typing import Any, TYPE_CHECKING

from edge_align.archive import pack_members, unpack_members
from edge_align.errors import ArtefactError, CorruptArtefact, IncompatibleBase, InputError, StorageError
from edge_align.files import (
    check_name,
    is_name,
    make_private_dir,
    parse_json_object,
    read_file,
    sha256_bytes,
    shown,
    storage_errors,
    sweep,
    sync_dir,
    write_atomic,
)
from edge_align.home import Home
from edge_align.profile_format import (
    Loaded,
    MANIFEST,
    NONE,
    parse_version,
    read_activations,
    read_choice,
    seal_manifest,
    TENSORS,
    version_folder,
    version_numbers,
    write_activations,
    write_choice,
)
from edge_align.tensors import dump_tensors

if TYPE_CHECKING:
    import numpy as np

ACTIVE = "active.json"
SIZE_LIMIT = 16 * 2**20  # bytes of a version or an archive; real ones have a few thousand

_REMOVED = ".removed-"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a profile."""

    profile: str
    number: int
    active: bool
    size_bytes: int
    manifest: dict[str, Any]  # empty when it cannot be read
    damage: str | None = None  # why it cannot be loaded


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    """One line of a list of profiles."""

    name: str
    active: int | None
    versions: int
    size_bytes: int  # of all versions
    current: bool
    damage: str | None = None  # why its active version is not known


@dataclass(frozen=True, slots=True)
class Usable:
    """What `load_usable` found."""

    version: int
    tensors: dict[str, np.ndarray]
    manifest: dict[str, Any]
    reason: str | None = None  # why it is not the active version


class ProfileStore:
    """The profiles of a home folder. Holds nothing open; several processes may use it at once.

    Every method raises InputError for a bad or unknown name or version, StorageError when the disk refuses, and
    CorruptArtefact or UnsupportedVersion when a file it needs cannot be used.
    """

    def __init__(self, home: Home) -> None:
        self._home = home

    def names(self) -> tuple[str, ...]:
        """All profiles that have a folder, sorted; links and folders that cannot be ours are left out."""
        folder = self._home.profiles_dir
        with storage_errors(folder):
            found = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return tuple(sorted(name for name in found if self.has(name)))

    def has(self, name: str) -> bool:
        """Is `name` one of `names()`? Costs the same however many there are."""
        folder = self._home.profiles_dir / name
        with storage_errors(folder):
            return is_name(name) and folder.is_dir() and not folder.is_symlink()

    def list(self) -> tuple[ProfileSummary, ...]:
        """All profiles with what a person wants to know about them; a damaged one is listed with its damage."""
        current = None
        with suppress(ArtefactError):
            current = self.current()
        return tuple(self._summary(name, current=name == current) for name in self.names())

    def versions(self, name: str) -> tuple[int, ...]:
        """Numbers of the complete versions, ascending."""
        folder = self._existing(name)
        return tuple(
            number for number in version_numbers(folder) if os.path.lexists(version_folder(folder, number) / MANIFEST)
        )

    def history(self, name: str) -> tuple[Version, ...]:
        """All complete versions, the oldest first."""
        active = None
        with suppress(ArtefactError):
            active = self.active_version(name)
        found = []
        for number in self.versions(name):
            manifest: dict[str, Any] = {}
            damage = None
            try:
                _, manifest = self._open(name, number)
            except ArtefactError as error:
                damage = str(error)
            found.append(Version(name, number, number == active, self.size_bytes(name, number), manifest, damage))
        return tuple(found)

    def size_bytes(self, name: str, version: int) -> int:
        """Bytes of the files of a version."""
        folder = version_folder(self._existing(name), version)
        with storage_errors(folder):
            return sum(entry.lstat().st_size for entry in folder.iterdir())

    def save(self, name: str, tensors: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> Version:
        """Keep a new version; it is complete and durable on return, and not active.

        manifest: anything JSON can hold. The keys schema, kind, created, tensors, tensors_sha256 and checksum are
        set here.
        """
        data = dump_tensors(tensors)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        shapes = {key: [array.dtype.name, [*array.shape]] for key, array in tensors.items()}
        sealed = seal_manifest(
            {**manifest, "created": created, "tensors": shapes, "tensors_sha256": sha256_bytes(data)}
        )
        if len(data) > SIZE_LIMIT or len(sealed) > SIZE_LIMIT:
            raise InputError(f"a profile of more than {SIZE_LIMIT:,} bytes is not kept")
        return self._add(name, data, sealed)

    def load(self, name: str, version: int | None = None, *, expect: Mapping[str, Any] | None = None) -> Loaded:
        """A version, by default the active one, after every check.

        expect: manifest keys with the values they must have here, such as base_hash, n_layer, d_model, k, pack_hash;
        IncompatibleBase lists all that differ.
        """
        if version is None:
            version = self.active_version(name)
            if version is None:
                raise _none_active(name)
        elif version not in (complete := self.versions(name)):
            known = ", ".join(map(str, complete)) or "none"
            raise InputError(f"profile {name} has no version {version}; there is {known}")
        tensors, manifest = self._open(name, version)
        wrong = [
            f"{key} is {manifest.get(key)!r:.40}, here {value!r:.40}"
            for key, value in (expect or {}).items()
            if manifest.get(key) != value
        ]
        if wrong:
            raise IncompatibleBase(
                f"profile {name} version {version} was made for another base: {'; '.join(wrong)}; "
                "choose its base with --model, or personalize for this one"
            )
        return tensors, manifest

    def load_usable(self, name: str, *, expect: Mapping[str, Any] | None = None) -> Usable:
        """The active version, or the latest one active before it that opens, with the reason.

        A version that was never active is not taken: it may have been refused. A version for another base is an
        error as in `load`, never passed over.
        """
        numbers = self._activations(name)
        if not numbers or numbers[-1] == NONE:
            raise _none_active(name)
        first: ArtefactError | None = None
        for number in dict.fromkeys(number for number in reversed(numbers) if number != NONE):
            try:
                tensors, manifest = self.load(name, number, expect=expect)
            except IncompatibleBase:
                raise
            except (ArtefactError, InputError) as error:  # InputError: its folder has lost the manifest
                first = first or CorruptArtefact(str(error))
            else:
                reason = None if first is None else f"{first}; version {number} is used instead of {numbers[-1]}"
                return Usable(number, tensors, manifest, reason)
        raise CorruptArtefact(f"{first}; no earlier version of profile {name} opens; personalize again")

    def activate(self, name: str, version: int) -> None:
        """Make a version the active one, after every check of it."""
        self._existing(name)
        with self._writing(name):
            self.load(name, version)
            numbers: tuple[int, ...] = ()
            with suppress(ArtefactError):  # a damaged record ends here, with a new one
                numbers = self._activations(name)
            if not numbers or numbers[-1] != version:
                write_activations(self._folder(name) / ACTIVE, (*numbers, version))

    def active_version(self, name: str) -> int | None:
        """The active version's number, None when there is none."""
        return next(reversed(self._activations(name)), NONE) or None

    def retire(self, name: str) -> None:
        """Have no version active, until one is activated or `undo` brings back the one that was."""
        with self._writing(name):
            if self.active_version(name) is not None:
                write_activations(self._folder(name) / ACTIVE, (*self._activations(name), NONE))

    def undo(self, name: str) -> int:
        """Make the version active that was active before, passing over damaged ones, and return its number.

        When the record of activations is itself damaged, the newest version that opens becomes active.
        """
        self._existing(name)
        with self._writing(name):
            try:
                numbers = self._activations(name)[:-1]
            except ArtefactError:
                numbers = self.versions(name)
            while numbers:
                with suppress(ArtefactError, InputError):
                    self.load(name, numbers[-1])
                    write_activations(self._folder(name) / ACTIVE, numbers)
                    return numbers[-1]
                numbers = numbers[:-1]
            raise InputError(f"profile {name} has no earlier version to go back to")

    def rename(self, name: str, new: str) -> None:
        """Give a profile another name, also as the one in use. Its feedback has a rename of its own."""
        folder = self._existing(name)
        with self._writing(new):
            self._check_new(new)
            if os.path.lexists(self._folder(new)):
                raise InputError(f"there is a profile {new} already; choose another name")
            with storage_errors(folder):
                os.rename(folder, self._folder(new))
                sync_dir(folder.parent)
            with suppress(ArtefactError):
                if read_choice(self._home.state_file) == name:
                    write_choice(self._home.state_file, new)

    def remove(self, name: str) -> None:
        """Delete a profile with all its versions. Its feedback is forgotten elsewhere."""
        folder = self._existing(name)
        with self._writing(name):
            with suppress(ArtefactError):
                if read_choice(self._home.state_file) == name:
                    write_choice(self._home.state_file, None)
            with storage_errors(folder):  # out of sight in one step; a kill after it leaves the rest to the next writer
                os.rename(folder, folder.parent / f"{_REMOVED}{secrets.token_hex(8)}")
                sync_dir(folder.parent)
            self._sweep_removed()

    def current(self) -> str | None:
        """The profile in use; None when none was chosen or it is gone."""
        name = read_choice(self._home.state_file)
        return name if name is not None and self.has(name) else None

    def use(self, name: str | None) -> None:
        """Choose the profile in use; None for no profile."""
        if name is not None:
            self._existing(name)
        with self._home.write_lock("profiles"):
            make_private_dir(self._home.root)
            write_choice(self._home.state_file, name)

    def export(self, name: str, version: int | None, path: Path, *, overwrite: bool = False) -> None:
        """Write a version, by default the active one, as a single file (zip); the same version gives the same bytes."""
        version = self.active_version(name) if version is None else version
        self.load(name, version)
        folder = version_folder(self._existing(name), version or 0)
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{shown(path)} exists; choose another file")
        members = {member: read_file(folder / member, limit=SIZE_LIMIT) for member in (MANIFEST, TENSORS)}
        write_atomic(path, pack_members(members))

    def import_(self, path: Path, name: str) -> Version:
        """Keep an exported version as a new version of `name`, not active, after every check of it."""
        check_name("profile", name)
        if not os.path.lexists(path):
            raise InputError(f"{shown(path)} does not exist")
        data = read_file(path.resolve(), limit=3 * SIZE_LIMIT)
        members = unpack_members(data, (MANIFEST, TENSORS), name=shown(path))
        parse_version(members[TENSORS], members[MANIFEST], name=shown(path))
        return self._add(name, members[TENSORS], members[MANIFEST])

    def _folder(self, name: str) -> Path:
        folder = self._home.profiles_dir / check_name("profile", name)
        _check_real(folder)
        return folder

    def _existing(self, name: str) -> Path:
        folder = self._folder(name)
        if not folder.is_dir():
            known = ", ".join(self.names()) or "none yet; `edge-align personalize` makes one"
            raise InputError(f"unknown profile {name}; there is {known}")
        return folder

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        check_name("profile", name)
        with self._home.write_lock("profiles"):
            for place in (self._home.root, self._folder(name)):
                sweep(place)
            self._sweep_removed()
            yield

    def _sweep_removed(self) -> None:
        for place in self._home.profiles_dir.glob(f"{_REMOVED}*"):
            shutil.rmtree(place, ignore_errors=True)

    def _check_new(self, name: str) -> None:
        for other in self.names():  # one folder on many systems: two people's data would mix
            if other != name and other.lower() == name.lower():
                raise InputError(f"there is a profile {other}; names must differ in more than upper and lower case")

    def _add(self, name: str, data: bytes, manifest: bytes) -> Version:
        with self._writing(name):
            self._check_new(name)
            folder = make_private_dir(self._folder(name))
            used = [*version_numbers(folder)]
            with suppress(ArtefactError):
                used += self._activations(name)
            number = max(used, default=0) + 1
            place = version_folder(folder, number)
            with storage_errors(place):
                os.mkdir(place, 0o700)
            try:
                write_atomic(place / TENSORS, data)
                write_atomic(place / MANIFEST, manifest)
                for parent in (folder, folder.parent):
                    with storage_errors(parent):
                        sync_dir(parent)
            except BaseException:  # full disk, Ctrl-C: give the space back
                shutil.rmtree(place, ignore_errors=True)
                raise
        return Version(name, number, False, len(data) + len(manifest), parse_json_object(manifest, shown(place)))

    def _open(self, name: str, version: int) -> Loaded:
        place = version_folder(self._existing(name), version)
        _check_real(place)
        manifest = read_file(place / MANIFEST, limit=SIZE_LIMIT)
        return parse_version(read_file(place / TENSORS, limit=SIZE_LIMIT), manifest, name=shown(place))

    def _activations(self, name: str) -> tuple[int, ...]:
        return read_activations(self._existing(name) / ACTIVE)

    def _summary(self, name: str, *, current: bool) -> ProfileSummary:
        active, damage = None, None
        try:
            active = self.active_version(name)
        except ArtefactError as error:
            damage = str(error)
        versions = self.versions(name)
        size = sum(self.size_bytes(name, number) for number in versions)
        return ProfileSummary(name, active, len(versions), size, current, damage)


def _check_real(folder: Path) -> None:
    if folder.is_symlink():
        raise StorageError(f"{shown(folder)} is a symbolic link; put the real folder in its place")


def _none_active(name: str) -> InputError:
    return InputError(f"profile {name} has no active version; give it more feedback and personalize again")
