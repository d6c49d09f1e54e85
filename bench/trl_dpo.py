"""LoRA-DPO by TRL's own DPOTrainer, on the pairs and with the settings of `lora_dpo.train`.

That one scores answers alone, without padding, and keeps no books; a test holds the two to the same adapter. Here it is
timed as it is, so that no one need take our word for what a LoRA costs.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from lora_dpo import DTYPES, LoRA, lora_adapter, lora_config, Rows, stored_bytes

from edge_align.errors import BackendUnavailable


def train(
    base: Any,
    rows: Sequence[Rows],
    settings: LoRA,
    *,
    dtype: str,
    seed: int,
    steps: int = 0,
    order: Sequence[int] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and losses, the adapter), as `lora_dpo.train`; `base` is left as it is.

    order: the pairs of all steps one after the other; None: TRL's own, shuffled in each epoch. Raises
    BackendUnavailable without trl.
    """
    try:
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast, PrinterCallback
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise BackendUnavailable("this needs the extra: pip install 'edge-align[bench]'") from None
    from tokenizers import models, Tokenizer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """The pairs are tokens already, and may have an order."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *given: Any) -> Any:
            return None if order is not None else super()._get_train_sampler(*given)

    pairs = [
        {"prompt_ids": [*map(int, prompt)], "chosen_ids": [*map(int, chosen)], "rejected_ids": [*map(int, rejected)]}
        for (prompt, chosen), (_, rejected) in rows
    ]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder,
            beta=settings.beta,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,  # AdamW's own
            max_grad_norm=0.0,
            num_train_epochs=settings.epochs if order is None else 1,
            max_steps=steps or -1,
            per_device_train_batch_size=settings.batch,
            precompute_ref_log_probs=True,
            max_length=None,
            gradient_checkpointing=False,
            optim="adamw_torch",
            bf16=False,  # the base is in `dtype` throughout, as there
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        trainer = Trainer(
            model=copy.deepcopy(base).to(DTYPES[dtype]),
            args=options,
            train_dataset=Dataset.from_list(pairs if order is None else [pairs[i] for i in order]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>"),
            peft_config=lora_config(settings),
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
    steps_sec = time.perf_counter() - begun
    done, total = int(trainer.state.global_step), -(-len(rows) // settings.batch) * settings.epochs
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = lora_adapter(trainer.model.get_base_model())
    return {
        "seconds": begun - start + steps_sec * total / done,
        "extrapolated": done < total,
        "steps": done,
        "steps_of_all": total,
        "dtype": dtype,
        "device": str(trainer.args.device),
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / len(losses[-5:]),
        "stored_bytes": stored_bytes(adapter),
    }, adapter
