"""A recipe's sections -> the objects of a run, and what is said and saved before and after it."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainingArguments, set_seed

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.dataset import SampleDataset
from qwenvl_ft.data.dense.groups import DenseGroups, EpochConversations
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode import Encoder
from qwenvl_ft.data.epochs import open_epochs
from qwenvl_ft.data.media import MediaPolicy
from qwenvl_ft.data.mixture import joined, load_mixture
from qwenvl_ft.data.pixels import obstacle
from qwenvl_ft.data.records import load_records
from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.load import load_model, load_processor, loading_options
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.training.arguments import lora_plus
from qwenvl_ft.training.callbacks.lisa import LisaCallback
from qwenvl_ft.training.callbacks.stopping import PatienceCallback
from qwenvl_ft.training.checkpointing import chosen_parts
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.methods.starts import wants_data
from qwenvl_ft.tuning.prepare import prepare_model, trainable_table
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.proven import unproven_line

logger = logging.getLogger(__name__)

WAITING = 0.03
"""More work than this, over the mean, of a step's costliest rank is told of."""
TOOL_FORMS = ("react_en", "react_zh", "qwen_en", "qwen_zh", "toolbench", "hermes", "default")
"""What ms-swift calls ways of writing tools into the system prompt."""


def build_processor(recipe: Any) -> Any:
    return load_processor(
        _model_path(recipe),
        min_pixels=recipe.template.min_pixels,
        max_pixels=recipe.template.max_pixels,
        video_min_pixels=recipe.template.video_min_pixels,
        video_max_pixels=recipe.template.video_max_pixels,
        video_frame_max_pixels=recipe.template.video_frame_max_pixels,
        fps=recipe.template.fps,
        min_frames=recipe.template.fps_min_frames,
        max_frames=recipe.template.fps_max_frames,
        revision=recipe.model.model_revision,
    )


def build_encoder(recipe: Any, processor: Any) -> Encoder:
    """The encoder of a recipe's template and media rules.

    Raises:
        RecipeError: ``template.tools_prompt`` is not a JSON list of function schemas.
    """
    template = recipe.template
    return Encoder(
        processor,
        max_length=template.max_length,
        truncation_strategy=template.truncation_strategy,
        system_prompt=template.system_prompt,
        tools=read_tools(template.tools_prompt) if template.tools_prompt else None,
        add_vision_id=template.add_vision_id,
        policy=MediaPolicy.of(recipe.data),
        raw_pixels=not obstacle(processor.image_processor),
    )


def read_tools(told: str) -> list[dict[str, Any]]:
    """Function schemas, from their JSON or the ``.json`` file that has it.

    Raises:
        RecipeError: the file cannot be read, it is no list of schemas, or a form's name of ms-swift, which the model's
            own template has no use for.
    """
    text = told
    if told.endswith(".json"):
        try:
            text = Path(told).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"template.tools_prompt: {told} cannot be read: {error}.") from None
    try:
        tools = json.loads(text)
    except ValueError:
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    if told in TOOL_FORMS:
        raise RecipeError(
            f"template.tools_prompt={told} is a form of tool prompts, but a Qwen-VL model is trained in the form "
            "of its own chat template. Leave the key out, give records 'tools' of their own, or give schemas here."
        )
    raise RecipeError(
        f"template.tools_prompt={told!r:.200} is not a JSON list of function schemas, nor a .json file with one. "
        'Example: \'[{"type": "function", "function": {"name": "measure", "parameters": {}}}]\'.'
    )


def build_datasets(
    recipe: Any, processor: Any, seed: int
) -> tuple[SampleDataset, SampleDataset | dict[str, SampleDataset] | None]:
    """Training and, if the recipe has any, validation samples; several sets by name."""
    train, val = load_mixture(recipe.data, seed)
    require_known(recipe.data.loss_weights, train.summary(), "data.loss_weights")
    encoder = build_encoder(recipe, processor)
    train_set = build_dataset(recipe, train, encoder, seed, "data.train", training=True)
    sets = {
        name: build_dataset(recipe, records, encoder, seed, f"data.val.{name}".rstrip("."))
        for name, records in val.items()
    }
    return train_set, sets[""] if "" in sets else sets or None


def require_known(told: Iterable[str], names: Iterable[str], key: str) -> None:
    """Raises RecipeError if what a key tells of is none of the training data."""
    names = list(names)
    if unknown := [name for name in told if name not in names]:
        raise RecipeError(f"{key}: {unknown[0]!r} is none of the data sets in data.train.{hint(unknown[0], names)}")


def build_dataset(
    recipe: Any, records: Any, encoder: Encoder, seed: int, name: str, *, training: bool = False
) -> SampleDataset:
    """The samples that a recipe makes of records; augmented, and other ones in each epoch, for training alone."""
    data = recipe.data
    epochs = open_epochs(
        records,
        DenseOptions.of(recipe, seed),
        augmenter=Augmenter.from_config(data.augmentation),
        training=training,
        policy=encoder.policy,
    )
    if training and recipe.template.system_prompt and isinstance(epochs, DenseGroups):
        raise RecipeError(
            f"template.system_prompt is of no use in {name}: dense captions are told their own. Give prompts.system, "
            "and prompts.system_summary for summaries."
        )
    return SampleDataset(
        epochs,
        encoder,
        name=name,
        num_proc=data.dataset_num_proc,
        on_error=data.on_error,
        max_bad_fraction=data.max_bad_fraction,
    )


def build_questions(recipe: Any, encoder: Encoder, seed: int) -> Any:
    """The conversations that are asked by generation after training, as far as they make a sample; None if none are.

    Raises:
        RecipeError: ``evaluation.run_after_training`` without data.
        DataError: a record does not end with an answer.
    """
    told, data = recipe.evaluation, recipe.data
    if not told.run_after_training:
        return None
    if not told.data and not data.evaluates:
        raise RecipeError("evaluation.run_after_training needs evaluation.data or data.val.")
    from qwenvl_ft.evaluation.generate import require_answers

    options = {"seed": seed, "media_root": data.media_root, "num_proc": data.dataset_num_proc}
    records = load_records(told.data, **options) if told.data else joined(load_mixture(data, seed)[1])
    dataset = build_dataset(recipe, records, encoder, seed, "evaluation.data")
    conversations: Any = EpochConversations(dataset.epochs, 0)
    usable = dataset.index[: told.limit].tolist()
    asked: Any = Subset(conversations, usable)
    require_answers(asked)
    if encoder.truncation_strategy in ("left", "right"):  # a sample can be cut to fit, its prompt is not
        short = [index for index in usable if encoder.prompt_length(conversations[index]) <= recipe.template.max_length]
        if len(short) < len(usable):
            logger.warning(
                "evaluation.data: %d of %d prompts are longer than template.max_length and are not asked.",
                len(usable) - len(short),
                len(usable),
            )
        usable = short
    return Subset(conversations, usable)


def build_model(recipe: Any, args: TrainingArguments, train_set: SampleDataset) -> nn.Module:
    """The model, frozen and adapted, in the precision it trains in; adapters start from the run's seed."""
    set_seed(args.seed)
    model = load_model(_model_path(recipe), **loading_options(recipe.model, recipe.quantization))
    batches = None
    if wants_data(recipe.tuner):
        if train_set.encoder.raw_pixels:
            use_raw_patches(model, train_set.encoder.processor.image_processor)
        model.to(args.device)
        batches = start_batches(recipe.tuner, train_set, args.seed)
    return prepared(model, recipe, args, batches=batches)


def prepared(model: nn.Module, recipe: Any, args: TrainingArguments, *, batches: Any = None) -> nn.Module:
    """The model, frozen and adapted, in the precision it trains in."""
    model = prepare_model(model, recipe.tuner, batches=batches)
    if (args.bf16 or args.fp16) and args.deepspeed is None:
        keep_float32(model, keep_adapter=recipe.tuner.lora_dtype is not None)
    return model


def build_trainer(
    recipe: Any, args: TrainingArguments, model: nn.Module, processor: Any, train_set: SampleDataset, **more: Any
) -> QwenVLTrainer:
    """The trainer of a recipe, without transformers' own console.

    Args:
        more: ``eval_dataset`` and ``callbacks``.
    """
    trainer = QwenVLTrainer(
        model,
        args,
        processor=processor,
        train_dataset=train_set,
        max_length=recipe.template.max_length,
        packing=recipe.training.packing,
        padding_free=recipe.training.padding_free,
        vit_lr=recipe.training.vit_lr,
        aligner_lr=recipe.training.aligner_lr,
        lorap_lr_ratio=lora_plus(recipe),
        loss_weights=recipe.data.loss_weights,
        zero_gradient_steps=recipe.training.zero_gradient_steps,
        z_loss=recipe.training.z_loss,
        checkpointed=chosen_parts(recipe.training),
        recipe=recipe,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def start_batches(tuner: TunerConfig, train_set: SampleDataset, seed: int) -> list[dict[str, Any]]:
    """The batches that a data-driven start of LoRA looks at: samples drawn by the seed, the same on every process.

    Raises:
        RecipeError: too few samples are as short as ``lora_ga_max_length``.
    """
    gradient = tuner.init_weights == "lora-ga"
    size, count = (
        (tuner.lora_ga_batch_size, tuner.lora_ga_iters) if gradient else (tuner.eva_batch_size, tuner.eva_iters)
    )
    order = np.random.default_rng(seed).permutation(len(train_set))
    short = order[train_set.lengths[order] <= tuner.lora_ga_max_length] if gradient else order
    if len(short) == 0:
        raise RecipeError(
            f"tuner.lora_ga_max_length={tuner.lora_ga_max_length} is below the shortest sample's "
            f"{train_set.lengths.min()} tokens. Raise it."
        )
    drawn = np.resize(short, size * count).reshape(count, size)
    raw = train_set.encoder.raw_pixels
    collate = QwenVLCollator(vision_fillers(train_set.encoder.processor, train_set.media_kinds, raw_pixels=raw))
    return [collate([train_set[int(index)] for index in batch]) for batch in drawn]


def keep_float32(model: nn.Module, *, keep_adapter: bool = False) -> None:
    """Hold every trained weight in float32; autocast computes in the lower precision.

    Args:
        keep_adapter: ``tuner.lora_dtype`` has said what LoRA's own weights are held in.

    AdamW at 1e-5 changes a bfloat16 weight by less than its last bit, so a model trained in plain bfloat16 loses most
    of its updates. DeepSpeed keeps a float32 copy of its own and is left alone.
    """
    for name, parameter in model.named_parameters():
        if keep_adapter and ".lora_" in name:
            continue
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def callbacks(recipe: Any, seed: int) -> list[Any]:
    """The callbacks behind ``training.early_stopping_patience`` and ``training.lisa_activated_layers``."""
    told = recipe.training
    made: list[Any] = []
    if told.early_stopping_patience is not None:
        made.append(PatienceCallback(early_stopping_patience=told.early_stopping_patience))
    if told.lisa_activated_layers:
        made.append(LisaCallback(told.lisa_activated_layers, told.lisa_step_interval, seed))
    return made


def tell(trainer: Any, progress: Any, resume: Path | None) -> None:
    """What is about to be trained, on what, from where: printed before the first step, and saved to be run again."""
    if not trainer.is_world_process_zero():
        return
    progress.follow(trainer.args)
    trainer.recipe.save(Path(trainer.args.output_dir) / "recipe.yaml")
    sampler = trainer.plan_sampler(trainer.train_dataset)
    args = trainer.args
    say = progress.say
    if trainer.recipe.phase:
        say(f"goes on from {trainer.recipe.tuner.resume_from_checkpoint or trainer.recipe.model.model}")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    say(f"{type(trainer.model).__name__}, {versions}, {args.device}, processes: {args.world_size}")
    for line in filter(None, (unproven_line(), *fallbacks())):
        say(line)
    if reason := obstacle(trainer.processing_class.image_processor):
        say(f"images are normalised in the loader's workers, at eight times the bytes: {reason}")
    if trainer.fused is not None:
        say(str(trainer.fused))
    if args.torch_compile:
        say(f"the language model's layers are compiled by {args.torch_compile_backend} in the first steps")
    rates = {"llm": args.learning_rate, "vision": trainer.vit_lr, "merger": trainer.aligner_lr}
    rates = {part: args.learning_rate if rate is None else rate for part, rate in rates.items()}
    for line in trainable_table(trainer.model, rates).splitlines():
        say(line)
    evaluated = trainer.eval_dataset
    sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    for dataset in filter(None, (trainer.train_dataset, *sets)):
        say(dataset.summary())
    if trainer.packing:
        say(f"packing: {len(sampler.rows(0)):,} rows of {trainer.max_length:,}, {sampler.fill():.1%} full")
    waiting = sampler.waiting() if args.world_size > 1 else 0.0
    if waiting > WAITING:
        more = "" if sampler.grouped else "; training.train_sampling_strategy=group_by_length lets like rows meet"
        say(f"the costliest rank of a step has {waiting:.0%} more to do than the mean{more}")
    if resume is not None:
        say(f"going on from {resume}")


def finish(trainer: Any, told: Any, questions: Any, progress: Any) -> dict[str, float]:
    """Save the trained model, unless told not to, and the run's state; ask the model the questions if there are any."""
    if trainer.recipe.training.save_final:
        trainer.save_model()
    trainer.save_state()
    if questions is None:
        return {}
    from qwenvl_ft.evaluation.generate import evaluate

    result = evaluate(
        trainer.accelerator.unwrap_model(trainer.model_wrapped),
        trainer.processing_class,
        questions,
        metric=told.metric,
        encoder=trainer.train_dataset.encoder,
        batch_size=told.batch_size,
        max_new_tokens=told.max_new_tokens,
    )
    if trainer.is_world_process_zero():
        name = told.metric.replace("_", " ")
        progress.say(f"{name} {result[told.metric]:.2%} of {result['count']} by generation, {result['seconds']:.1f} s")
    return {told.metric: result[told.metric], f"{told.metric}_count": result["count"]}


def _model_path(recipe: Any) -> str:
    """A local folder by its full path, which an adapter's config keeps as the name of its base model."""
    if not recipe.model.model:
        raise RecipeError("model.model is not set. Give a directory or an id: model.model=Qwen/Qwen3-VL-4B-Instruct.")
    folder = Path(recipe.model.model)
    return str(folder.resolve()) if folder.is_dir() else recipe.model.model
