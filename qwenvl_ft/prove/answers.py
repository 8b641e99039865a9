"""Generates the trained model's answers token by token, and saves the inputs for another process to repeat them.

Letters: K supervised tokens of a sample, N new tokens, V vocabulary size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.evaluation.generate import STOP_TOKENS, prompt_batch
from qwenvl_ft.prove.subject import Subject


@dataclass
class Answers:
    """A model's answers, with one entry per sample."""

    logits: list[Tensor] = field(default_factory=list)
    """float32[K, V] at the positions that predict supervised tokens."""
    tokens: list[Tensor] = field(default_factory=list)
    """int64[N], generated greedily."""
    steps: list[Tensor] = field(default_factory=list)
    """float32[N, V], the logits of the generated tokens."""


def generation(subject: Subject) -> GenerationConfig:
    """Return the settings for greedy decoding of exactly ``new_tokens`` tokens."""
    tokenizer, count = subject.processor.tokenizer, subject.options.new_tokens
    return GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS],
        pad_token_id=tokenizer.pad_token_id,
    )


def write_inputs(subject: Subject, index: int, folder: Path) -> tuple[Path, Path]:
    """Write a sample and its prompt as plain transformers needs them: the processor's pixels, no position ids."""
    encoder = copy.copy(subject.dataset.encoder)
    encoder.raw_pixels = False
    conversation = subject.dataset.conversation(index)
    sample = encoder(conversation)
    whole = prompt_batch(subject.processor, [sample])
    whole["keep"] = (sample["labels"] != IGNORE).nonzero(as_tuple=True)[0] - 1
    prompt = prompt_batch(subject.processor, [encoder.prompt(conversation)])
    paths = folder / f"{index}.safetensors", folder / f"{index}.prompt.safetensors"
    for path, tensors in zip(paths, (whole, prompt), strict=True):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return paths


def answer(model: Any, path: Path, settings: GenerationConfig, subject: Subject) -> tuple[Tensor, Tensor]:
    """Generate an answer to a saved prompt; return its tokens int64[N] and logits float32[N, V]."""
    prompt = {key: value.to(subject.device) for key, value in load_file(path).items()}
    model.eval()
    with torch.no_grad(), subject.autocast():
        output = model.generate(**prompt, generation_config=settings)
        forget_offsets(model)
    return output.sequences[0, prompt["input_ids"].shape[1] :].cpu(), torch.cat(output.logits).float().cpu()


def at_once(model: Any, path: Path, tokens: Tensor, subject: Subject) -> Tensor:
    """Return the logits float32[N, V] of an answer from one forward pass over prompt and answer, without a cache."""
    prompt = {key: value.to(subject.device) for key, value in load_file(path).items()}
    begin, new = prompt["input_ids"].shape[1], tokens[None].to(subject.device)
    fillers = {"input_ids": new, "attention_mask": torch.ones_like(new), "mm_token_type_ids": torch.zeros_like(new)}
    whole = prompt | {key: torch.cat([prompt[key], value], dim=1) for key, value in fillers.items()}
    keep = torch.arange(begin - 1, begin - 1 + len(tokens), device=subject.device)
    model.eval()
    with torch.no_grad(), subject.autocast():
        return model(**whole, logits_to_keep=keep, use_cache=False).logits[0].float().cpu()


def forget_offsets(model: Any) -> None:
    """Remove the position offsets that generation leaves in the model; the next text-only input would use them."""
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
