"""Script for a process of its own: loads saved weights with transformers and peft alone, and saves their answers.

    python -P plain_transformers.py JOBS.json

A job gives the folder of a model and optionally of an adapter, a device, the inputs of some samples, and the output
file. This script imports nothing of qwenvl_ft, and asserts at its end that nothing else did.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging


def opened(job):
    """Load the model of a job, in the job's precision."""
    config = AutoConfig.from_pretrained(job["model"], revision=job["revision"])
    for name, value in job["text"].items():
        setattr(config.get_text_config(), name, value)
    options = {"dtype": getattr(torch, job["dtype"]), "config": config, "revision": job["revision"]}
    if job["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig(**job["quantization"])
    model = AutoModelForImageTextToText.from_pretrained(job["model"], use_safetensors=True, **options)
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    return model.to(job["device"]).eval()


def answered(model, job):
    """Return logits at the positions that predict an answer, and greedily generated tokens."""
    found = {}
    settings = GenerationConfig(**job["generation"])
    for number, paths in enumerate(job["samples"]):
        sample, prompt = ({k: v.to(job["device"]) for k, v in load_file(path).items()} for path in paths)
        keep = sample.pop("keep")
        with torch.no_grad():
            logits = model(**sample, logits_to_keep=keep, use_cache=False).logits[0]
            output = model.generate(**prompt, generation_config=settings)
        for module in model.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None  # or the next text-only prompt would use these offsets
        found[f"logits.{number}"] = logits.float().cpu()
        found[f"tokens.{number}"] = output.sequences[0, prompt["input_ids"].shape[1] :].cpu()
        found[f"steps.{number}"] = torch.cat(output.logits).float().cpu()
    return {key: value.contiguous() for key, value in found.items()}


def main(path):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for job in json.loads(Path(path).read_text(encoding="utf-8")):
        try:
            model = opened(job)
            save_file(answered(model, job), job["out"])
        except Exception as error:  # the job's row reports it; the next job still runs
            Path(job["out"]).with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    assert "qwenvl_ft" not in sys.modules, "the process was not independent"


if __name__ == "__main__":
    main(sys.argv[1])
