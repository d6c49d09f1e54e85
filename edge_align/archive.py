"""A few named byte strings as one zip file: uncompressed, the same bytes for the same content, strictly read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence

from edge_align.errors import CorruptArtefact


def pack_members(members: Mapping[str, bytes]) -> bytes:
    """The bytes of a zip file; without clock, owner or system in them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o600 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def unpack_members(data: bytes, names: Sequence[str], *, name: str) -> dict[str, bytes]:
    """The members of a zip file that holds exactly `names`, uncompressed; nothing is written anywhere.

    Raises CorruptArtefact that calls the archive `name`.
    """
    wanted = sorted(names)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sorted(entry.filename for entry in entries) != wanted:
                raise CorruptArtefact(f"{name} does not hold exactly {' and '.join(wanted)}; it was not exported here")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or not 0 <= entry.file_size <= len(data):
                    raise CorruptArtefact(f"{name} is damaged: {entry.filename} has an impossible size or method")
            return {entry.filename: archive.read(entry) for entry in entries}
    except CorruptArtefact:
        raise
    except Exception as error:  # whatever a parser raises on foreign bytes, the bytes are damaged
        raise CorruptArtefact(f"{name} is damaged: not readable as a zip archive") from error
