"""A causal model of transformers, steered by hooks on its blocks: any architecture it loads, from a folder or a GGUF.

For gradients and parity where our own reference does not compute the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_align.errors import BackendUnavailable, CorruptArtefact
from edge_align.files import shown


@dataclass(frozen=True, slots=True)
class HookedShape:
    n_layer: int
    d_model: int


class HookedModel:
    """The model, frozen. `open` raises BackendUnavailable (no transformers, an architecture it does not load) and
    CorruptArtefact (a folder it cannot read).
    """

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        text = model.config.get_text_config()
        self.shape = HookedShape(int(text.num_hidden_layers), int(text.hidden_size))
        self.dtype, self.device = model.dtype, model.device
        self._added: tuple[range, torch.Tensor, torch.Tensor] | None = None
        for il, block in enumerate(_blocks(model)):
            block.register_forward_hook(self._hook(il))

    @classmethod
    def open(cls, path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> HookedModel:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise BackendUnavailable('this needs transformers; run: pip install "edge-align[export]"') from error
        gguf = path.is_file()
        where, options = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
        try:
            with redirect_stderr(StringIO()):  # a progress bar that cannot be switched off
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    where, dtype=dtype, local_files_only=True, output_loading_info=True, **options
                )
        except Exception as error:  # whatever it raises on a stranger's file, the file is the reason
            said = f"{shown(path)}: {' '.join(str(error).split())[:160]}"
            raise (BackendUnavailable if gguf else CorruptArtefact)(said) from error
        if loaded["missing_keys"]:  # it would fill these in by chance
            raise CorruptArtefact(f"{shown(path)} has no weight for {min(loaded['missing_keys'])}")
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the usual one leaves that bound out
        return cls(model.to(device))

    def logits(
        self,
        tokens: torch.Tensor,
        *,
        first: int = 0,
        vectors: torch.Tensor | None = None,
        layers: range = range(0),
        steered: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T - first, n_vocab): of right-padded rows (B, T), from position `first` on.

        vectors (B or 1, len(layers), d_model) are added to the outputs of `layers` where steered (B, T) is True.
        """
        with self._adding(vectors, layers, steered):
            made: torch.Tensor = self._model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
        return made

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], completion: Sequence[int], vectors: np.ndarray | None = None) -> np.ndarray:
        """Teacher-forced logits (len(completion), n_vocab) float32; steered from the last prompt token on, by vectors
        (n_layer, d_model).
        """
        tokens, first = torch.tensor([[*prompt, *completion[:-1]]], device=self.device), len(prompt) - 1
        steering = None if vectors is None else torch.from_numpy(np.array(vectors))[None].to(self.device)
        steered = torch.arange(tokens.shape[1], device=self.device)[None] >= first
        layers = range(self.shape.n_layer)
        logits = self.logits(tokens, first=first, vectors=steering, layers=layers, steered=steered)
        return logits[0].float().cpu().numpy()

    @contextmanager
    def _adding(self, vectors: torch.Tensor | None, layers: range, steered: torch.Tensor | None) -> Iterator[None]:
        if vectors is not None and steered is not None:
            self._added = layers, vectors, steered[..., None].to(self.dtype)
        try:
            yield
        finally:
            self._added = None

    def _hook(self, il: int) -> Callable[[Any, Any, Any], Any]:
        def steer(_module: Any, _inputs: Any, output: Any) -> Any:
            if self._added is None or il not in self._added[0]:
                return output
            layers, vectors, steered = self._added
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + steered * vectors[:, il - layers.start, None].to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return steer


def _blocks(model: Any) -> Any:
    """The list of decoder blocks: the longest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    found = max(lists, key=len, default=None)
    if found is None or len(found) != model.config.get_text_config().num_hidden_layers:
        raise BackendUnavailable(
            f"the blocks of {type(model).__name__} are not where they are looked for; no reference"
        )
    return found
