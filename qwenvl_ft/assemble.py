"""A recipe becomes the objects that commands and training share: processor, encoder, data sets, questions, model.

The trainer is built in `training/`, above `look/`, which reads data through this module.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.dense.groups import DenseGroups, EpochConversations
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.patches import obstacle
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.epochs import open_epochs
from qwenvl_ft.data.sources.mixture import joined, load_mixture
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.load import load_model, load_processor, loading_options
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.schema import Recipe, TunerConfig
from qwenvl_ft.tuning.methods.starts import wants_data
from qwenvl_ft.tuning.prepare import prepare_model

logger = logging.getLogger(__name__)

TOOL_FORMS = ("react_en", "react_zh", "qwen_en", "qwen_zh", "toolbench", "hermes", "default")
"""What ms-swift calls ways of writing tools into the system prompt."""


def build_processor(recipe: Recipe) -> Any:
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


def build_encoder(recipe: Recipe, processor: Any) -> Encoder:
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
    recipe: Recipe, processor: Any, seed: int
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
    recipe: Recipe, records: Any, encoder: Encoder, seed: int, name: str, *, training: bool = False
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


def build_questions(recipe: Recipe, encoder: Encoder, seed: int) -> Any:
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

    if told.data:
        records = load_records(told.data, seed=seed, media_root=data.media_root, num_proc=data.dataset_num_proc)
    else:
        records = joined(load_mixture(data, seed)[1])
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


def build_model(recipe: Recipe, args: TrainingArguments, train_set: SampleDataset) -> nn.Module:
    """The model, frozen and adapted, in the precision it trains in; adapters start from the run's seed."""
    set_seed(args.seed)
    model = load_model(_model_path(recipe), loading_options(recipe.model, recipe.quantization))
    batches = None
    if wants_data(recipe.tuner):
        if train_set.encoder.raw_pixels:
            use_raw_patches(model, train_set.encoder.processor.image_processor)
        model.to(args.device)
        batches = start_batches(recipe.tuner, train_set, args.seed)
    return prepared(model, recipe, args, batches=batches)


def prepared(model: nn.Module, recipe: Recipe, args: TrainingArguments, *, batches: Any = None) -> nn.Module:
    """The model, frozen and adapted, in the precision it trains in."""
    model = prepare_model(model, recipe.tuner, batches=batches)
    if (args.bf16 or args.fp16) and args.deepspeed is None:
        keep_float32(model, keep_adapter=recipe.tuner.lora_dtype is not None)
    return model


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


def _model_path(recipe: Recipe) -> str:
    """A local folder by its full path, which an adapter's config keeps as the name of its base model."""
    if not recipe.model.model:
        raise RecipeError("model.model is not set. Give a directory or an id: model.model=Qwen/Qwen3-VL-4B-Instruct.")
    folder = Path(recipe.model.model)
    return str(folder.resolve()) if folder.is_dir() else recipe.model.model
