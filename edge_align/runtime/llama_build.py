"""What the compiler left in llama.cpp's library: may Intel's matrix units (AMX) be used?

GCC drops half of the 64 bytes that `ldtilecfg` reads, as stores nobody needs (GCC bug 114098, llama.cpp issue 20824);
the process then ends with a general protection fault. Versions from SOUND_GCC on do not, and none does with
the first two of FLAGS, which scripts/install.py asks for; the third writes them into the library.
"""

from __future__ import annotations

import re
from pathlib import Path

FLAGS = "-fno-dse -fno-tree-dse -frecord-gcc-switches"
SOUND_GCC = {11: 5, 12: 4, 13: 3}  # major -> first minor; all later majors are sound

_GCC = re.compile(rb"GCC: \([^)\0]*\) (\d+)\.(\d+)\.")


def keeps_tile_configuration(library: bytes) -> bool:
    """Was this library (ELF) compiled so that AMX works? False where it does not say."""
    if b"-fno-tree-dse" in library:
        return True
    versions = [(int(major), int(minor)) for major, minor in _GCC.findall(library)]
    return bool(versions) and all(
        major > max(SOUND_GCC) or minor >= SOUND_GCC.get(major, minor + 1) for major, minor in versions
    )


def amx_is_sound(folder: Path) -> bool:
    """The same of every build of ggml's kernels in `folder`; False where there is none, or one cannot be read."""
    try:
        found = [path.read_bytes() for path in folder.glob("*ggml-cpu*")]
    except OSError:
        return False
    return bool(found) and all(map(keeps_tile_configuration, found))
