"""Runs by itself in a new process: open saved weights by plain transformers and peft alone, and say what they answer.

    python -P plain.py JOBS.json

A job names a model's folder, an adapter's (or none), a device, the inputs of some samples, and where results go. This
file imports nothing of qwenvl_ft, and checks at its end that nothing else did.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging


def opened(job):
    """The model of a job, in the job's precision."""
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
    """Logits at the tokens that predict an answer, and the likeliest tokens one by one."""
    found = {}
    settings = GenerationConfig(**job["generation"])
    for number, paths in enumerate(job["samples"]):
        seen, asked = ({k: v.to(job["device"]) for k, v in load_file(path).items()} for path in paths)
        keep = seen.pop("keep")
        with torch.no_grad():
            logits = model(**seen, logits_to_keep=keep, use_cache=False).logits[0]
            said = model.generate(**asked, generation_config=settings)
        for module in model.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None  # the next text alone would find this prompt's offsets
        found[f"logits.{number}"] = logits.float().cpu()
        found[f"tokens.{number}"] = said.sequences[0, asked["input_ids"].shape[1] :].cpu()
        found[f"steps.{number}"] = torch.cat(said.logits).float().cpu()
    return {key: value.contiguous() for key, value in found.items()}


def main(path):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for job in json.loads(Path(path).read_text(encoding="utf-8")):
        try:
            model = opened(job)
            save_file(answered(model, job), job["out"])
        except Exception as error:  # one job's failure is its row's; the next one runs
            Path(job["out"]).with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    assert "qwenvl_ft" not in sys.modules, "the process was not independent"


if __name__ == "__main__":
    main(sys.argv[1])
