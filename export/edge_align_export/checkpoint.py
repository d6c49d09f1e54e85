"""A GGUF or a Hugging Face folder, opened as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from edge_align.errors import InputError
from edge_align.files import shown
from edge_align_export.checkpoint_gguf import open_gguf
from edge_align_export.checkpoint_hf import open_folder
from edge_align_export.decoder_spec import Checkpoint


def open_checkpoint(source: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder.

    Raises InputError (neither), ModelLoadError (damaged or incomplete), BackendUnavailable (another architecture).
    """
    if source.is_dir():
        return open_folder(source)
    if not source.is_file():
        raise InputError(f"{shown(source)} is neither a GGUF file nor a folder with a Hugging Face checkpoint")
    return open_gguf(source)
