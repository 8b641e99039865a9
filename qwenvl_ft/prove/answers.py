"""What a model answers, token by token: by the trained model here, and by what was saved in a process of its own.

Letters: K supervised tokens of a sample, N new tokens, V words.
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
    """What a model said, an entry for each sample; N new tokens."""

    logits: list[Tensor] = field(default_factory=list)
    """float32[K, V] where an answer is predicted."""
    tokens: list[Tensor] = field(default_factory=list)
    """int64[N], the likeliest one by one."""
    steps: list[Tensor] = field(default_factory=list)
    """float32[N, V] that they were taken from."""


def generation(subject: Subject) -> GenerationConfig:
    """The likeliest token each time, and exactly so many of them."""
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
    """A sample and its prompt, as plain transformers takes them: pixels by the processor, no positions."""
    encoder = copy.copy(subject.dataset.encoder)
    encoder.raw_pixels = False
    conversation = subject.dataset.conversation(index)
    sample = encoder(conversation)
    whole = prompt_batch(subject.processor, [sample])
    whole["keep"] = (sample["labels"] != IGNORE).nonzero(as_tuple=True)[0] - 1
    asked = prompt_batch(subject.processor, [encoder.prompt(conversation)])
    paths = folder / f"{index}.safetensors", folder / f"{index}.prompt.safetensors"
    for path, tensors in zip(paths, (whole, asked), strict=True):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return paths


def answer(model: Any, path: Path, settings: GenerationConfig, subject: Subject) -> tuple[Tensor, Tensor]:
    asked = {key: value.to(subject.device) for key, value in load_file(path).items()}
    model.eval()
    with torch.no_grad(), subject.autocast():
        said = model.generate(**asked, generation_config=settings)
        forget_offsets(model)
    return said.sequences[0, asked["input_ids"].shape[1] :].cpu(), torch.cat(said.logits).float().cpu()


def at_once(model: Any, path: Path, tokens: Tensor, subject: Subject) -> Tensor:
    """float32[N, V]: logits of an answer's tokens by one pass over all of it, without a cache."""
    asked = {key: value.to(subject.device) for key, value in load_file(path).items()}
    begin, new = asked["input_ids"].shape[1], tokens[None].to(subject.device)
    fillers = {"input_ids": new, "attention_mask": torch.ones_like(new), "mm_token_type_ids": torch.zeros_like(new)}
    whole = asked | {key: torch.cat([asked[key], value], dim=1) for key, value in fillers.items()}
    keep = torch.arange(begin - 1, begin - 1 + len(tokens), device=subject.device)
    model.eval()
    with torch.no_grad(), subject.autocast():
        return model(**whole, logits_to_keep=keep, use_cache=False).logits[0].float().cpu()


def forget_offsets(model: Any) -> None:
    """Generation leaves its last prompt's position offsets in the model, where the next text alone would find them."""
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
