"""Training steps of a plain transformers Trainer, as in its documentation, for comparison with ours.

Both use the same kind of synthetic records, the same model with random weights, and the same precision, optimizer and
gradient checkpointing. The plain Trainer differs in three ways: its collator calls the processor on a padded batch, the
model computes its own loss over the logits of all tokens, and attention is SDPA with a mask. Not part of the package.
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, ProgressCallback, Trainer, TrainingArguments

from qwenvl_ft.bench.flops import Row, model_work
from qwenvl_ft.bench.sizes import bench_processor, make_config
from qwenvl_ft.bench.step import Clock, StepOptions, device_peak
from qwenvl_ft.bench.workload import filled_records

LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
RANK, ALPHA, DROPOUT = 16, 32, 0.05


class Collator:
    """Turn records into a right-padded batch. Labels cover the answer, its end token and the newline after it."""

    def __init__(self, processor) -> None:
        self.processor = processor
        processor.tokenizer.padding_side = "right"

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        texts = [self.processor.apply_chat_template(messages(record), tokenize=False) for record in records]
        images = [Image.open(io.BytesIO(image)) for record in records for image in record.get("image", [])]
        batch = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for row, record in enumerate(records):
            end = int(batch["attention_mask"][row].sum())
            answer = self.processor.tokenizer.encode(record["conversations"][1]["value"], add_special_tokens=False)
            begin = end - len(answer) - 2
            labels[row, begin:end] = batch["input_ids"][row, begin:end]
        return {**batch, "labels": labels}


def messages(record: dict) -> list[dict]:
    """Return a record as messages for the chat template."""
    question, answer = (turn["value"] for turn in record["conversations"])
    content = [{"type": "image"} for _ in record.get("image", [])]
    content.append({"type": "text", "text": question.removeprefix("<image>\n")})
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


class PaddedClock(Clock):
    """Counts tokens without padding; the counts stay on the device until the end."""

    def _see(self, module, positional, kwargs) -> None:
        text = pad(kwargs["attention_mask"].sum(dim=1).cumsum(0), (1, 0))
        grid = kwargs.get("image_grid_thw")
        vision = None if grid is None else pad(grid.prod(dim=1).cumsum(0), (1, 0))
        self.seen.append((self.step, text, vision, (kwargs["labels"][:, 1:] != -100).sum()))

    def rows(self) -> list[Row]:
        return [Row(row.samples, row.frames, int(row.supervised)) for row in super().rows()]


def plain_model(size: str, train_type: str, device: torch.device):
    """Build a model with random weights: trainable ones in float32, frozen ones in 16 bits on a GPU."""
    full = train_type == "full"
    dtype = torch.float32 if full or device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(make_config(size), dtype=dtype, attn_implementation="sdpa")
    if full:
        return model
    from peft import LoraConfig, get_peft_model

    model.enable_input_require_grads()
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=LORA_TARGETS)
    return get_peft_model(model, lora)


def plain_step(options: StepOptions, batch: int, accumulation: int) -> dict:
    """Train a few steps of ``batch * accumulation`` samples. Returns figures named as in `StepResult`."""
    on_gpu = torch.cuda.is_available()
    steps = options.warmup + options.steps
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=str(Path(folder) / "output"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=options.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=on_gpu,
            remove_unused_columns=False,
            dataloader_num_workers=4 if on_gpu else 0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            weight_decay=0.1,
        )
        processor = bench_processor()
        records = plain_records(processor.tokenizer, options, batch * accumulation * steps)
        model = plain_model(options.size, options.train_type, args.device)
        trainer = Trainer(model, args, train_dataset=records, data_collator=Collator(processor))
        trainer.remove_callback(ProgressCallback)
        clock = PaddedClock(args.device, options.warmup, options.steps)
        trainer.add_callback(clock)
        trainer.train()
    return figures(clock, model_work(trainer.model), args.device)


def plain_records(tokenizer, options: StepOptions, samples: int) -> list[dict]:
    """Return the first ``samples`` records of the benchmark's workload, with images in memory."""
    workload = filled_records(
        tokenizer,
        tokens=2 * samples * mean_of(options),
        mean_sample=mean_of(options),
        longest=options.row_length,
        image_share=options.image_share,
        supervised_share=options.supervised_share,
        seed=42,
    )
    return workload.records[:samples]


def mean_of(options: StepOptions) -> int:
    """Return the mean number of tokens per sample."""
    return options.mean_sample or min(512, options.row_length // 8)


def figures(clock: Clock, work, device: torch.device) -> dict:
    """Return the figures that a clock recorded."""
    rows, seconds = clock.rows(), sum(clock.seconds())
    flops = work.flops(rows)["total"]
    peak, source = device_peak(device, "bfloat16" if device.type == "cuda" else "float32")
    return {
        "steps": clock.last - clock.warmup,
        "seconds": round(seconds, 4),
        "tokens": sum(row.tokens for row in rows),
        "samples": sum(len(row.samples) for row in rows),
        "supervised_tokens": sum(row.supervised for row in rows),
        "mfu": round(flops / seconds / (peak * 1e12), 4),
        "peak_tflops": peak,
        "peak_source": source,
        "attention": "sdpa",
    }
