"""Builds from a recipe what commands and training share: processor, encoder, data sets, questions, model.

The trainer is built in `training/build.py`: this module stands below `look/`, which reads data through it.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.conversation import Image
from qwenvl_ft.data.dense.compose import DenseImage
from qwenvl_ft.data.dense.groups import DenseGroups, EpochConversations
from qwenvl_ft.data.dense.options import SCALES, DenseOptions
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.reading import save_reading
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.epochs import Epochs, open_epochs
from qwenvl_ft.data.plan.windows import StreamOptions, WindowDataset, Windows
from qwenvl_ft.data.sources.files import default_cache
from qwenvl_ft.data.sources.mixture import joined, load_mixture, load_options, load_validation, register
from qwenvl_ft.data.sources.records import Records, load_records
from qwenvl_ft.data.sources.shards import list_shards
from qwenvl_ft.data.sources.stream import Stream
from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.evaluation.metrics import GEOMETRY
from qwenvl_ft.model.load import load_model, load_processor, loading_options
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.model.processor import set_template_limits
from qwenvl_ft.recipe.schema import Recipe, TunerConfig
from qwenvl_ft.tuning.methods.starts import wants_data
from qwenvl_ft.tuning.prepare import prepare_model

TRAIN = "data.train"

logger = logging.getLogger(__name__)


def build_processor(recipe: Recipe) -> Any:
    """Load the processor of a recipe's model with the pixel limits and frame rates of ``template``.

    It is saved with the model, and with it how ``data`` converts deep images, so that inference does the same.
    """
    processor = load_processor(_model_path(recipe), revision=recipe.model.model_revision)
    set_template_limits(processor, recipe.template)
    save_reading(processor, MediaPolicy.of(recipe.data).reading)
    return processor


def build_datasets(
    recipe: Recipe, processor: Any, seed: int | None = None, *, stream: StreamOptions | None = None
) -> tuple[SampleDataset, SampleDataset | dict[str, SampleDataset] | None]:
    """Return the training samples, and the validation samples if there are any: one set, or several by name.

    Args:
        seed: of draws and splits; None is ``training.seed``.
        stream: how this process takes part in the stream of ``data.streaming``; None reads it alone.
    """
    seed = int(recipe.training.arguments["seed"]) if seed is None else seed
    encoder = build_encoder(recipe, processor)
    train_set: SampleDataset
    if recipe.data.streaming:
        val = load_validation(recipe.data, seed)
        train_set = build_stream(recipe, encoder, seed, stream or stream_options(recipe))
    else:
        train, val = load_mixture(recipe.data, seed)
        require_known(recipe.data.loss_weights, train.summary(), "data.loss_weights")
        train_set = build_dataset(recipe, train, encoder, seed, TRAIN, training=True)
    sets = {
        name: build_dataset(recipe, records, encoder, seed, f"data.val.{name}".rstrip("."))
        for name, records in val.items()
    }
    return train_set, sets[""] if "" in sets else sets or None


def require_known(keys: Iterable[str], names: Iterable[str], key: str) -> None:
    """Raise RecipeError if the mapping under ``key`` names a data set that is not in ``data.train``."""
    names = list(names)
    if unknown := [name for name in keys if name not in names]:
        raise RecipeError(f"{key}: {unknown[0]!r} is none of the data sets in data.train.{hint(unknown[0], names)}")


def build_dataset(
    recipe: Recipe, records: Any, encoder: Encoder, seed: int, name: str, *, training: bool = False
) -> SampleDataset:
    """Build the samples of records; for training they are augmented, and dense captions are drawn anew each epoch.

    Args:
        name: recipe key of the records, for messages.

    Raises:
        RecipeError: ``template.system_prompt`` is set, but the records are dense captions with prompts of their own.
    """
    return SampleDataset(
        build_epochs(recipe, records, encoder, seed, name, training=training),
        encoder,
        name=name,
        left_out=records.left_out() if isinstance(records, Records) else 0,
        **_measuring(recipe),
    )


def stream_options(recipe: Recipe) -> StreamOptions:
    """Return how this process reads the recipe's stream from its beginning; it lists the shards by itself."""
    data, output = recipe.data, Path(recipe.training.arguments["output_dir"])
    run = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    cache = Path(data.stream_cache).expanduser() if data.stream_cache else default_cache()
    return StreamOptions(
        cache / f"stream-{run}" / str(rank - local_rank),  # its processes on this machine have the same one
        lambda: list_shards(cast(Any, data.train)),
        data.stream_rounds,
        leads=local_rank == 0,
    )


def build_stream(recipe: Recipe, encoder: Encoder, seed: int, options: StreamOptions) -> WindowDataset:
    """Build the samples of a stream; see `build_dataset`."""
    data = recipe.data
    register(data)
    begin = options.saved.begin
    shards = tuple(options.listed()) if begin.shards is None else begin.shards
    options.saved = options.saved._replace(begin=begin._replace(shards=shards))
    require_known(data.loss_weights, {shard.name for shard in shards}, "data.loss_weights")
    stream = Stream(data.stream_window, options.folder, load_options(data, seed))

    def conversations(records: Records) -> Epochs:
        return build_epochs(recipe, records, encoder, seed, TRAIN, training=True)

    return WindowDataset(Windows(stream, conversations, options), encoder, name=TRAIN, **_measuring(recipe))


def _measuring(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a data set by which its samples are measured."""
    data = recipe.data
    on_error = "skip" if data.skips_unreadable else "raise"
    return {"num_proc": data.dataset_num_proc, "on_error": on_error, "max_bad_fraction": data.bad_limit}


def build_epochs(
    recipe: Recipe, records: Any, encoder: Encoder, seed: int, name: str, *, training: bool = False
) -> Epochs:
    """Build the conversations of records; see `build_dataset`."""
    data = recipe.data
    epochs = open_epochs(
        records,
        DenseOptions.of(recipe, seed),
        augmenter=Augmenter.from_config(data.augmentation),
        training=training,
        policy=encoder.policy,
        skip=data.skips_unreadable,
    )
    if training and recipe.template.system_prompt and isinstance(epochs, DenseGroups):
        raise RecipeError(
            f"template.system_prompt is of no use in {name}: dense captions have their own. Give prompts.system, "
            "and prompts.system_summary for summaries."
        )
    return epochs


def asked_conversations(recipe: Recipe, encoder: Encoder, seed: int) -> Any:
    """Return the conversations to answer by generation, those that make a sample; None for none.

    Dense captions have no summaries if the metric is ``geometry``, because a summary has no coordinates.

    Raises:
        RecipeError: ``evaluation.run_after_training`` or ``run_during_training`` without data.
        DataError: a record does not end with an answer that ``evaluation.metric`` can read.
    """
    section, data = recipe.evaluation, recipe.data
    if not section.asks:
        return None
    if not section.data and not data.evaluates:
        raise RecipeError("evaluation needs records to answer. Set evaluation.data or data.val.")
    if section.metric == GEOMETRY:
        recipe = replace(recipe, data=replace(data, summary_ratio=None))
    from qwenvl_ft.evaluation.generate import require_answers

    if section.data:
        records = load_records(section.data, **load_options(data, seed))
    else:
        records = joined(load_validation(data, seed) if data.streaming else load_mixture(data, seed)[1])
    dataset = build_dataset(recipe, records, encoder, seed, "evaluation.data")
    conversations: Any = EpochConversations(dataset.epochs, 0)
    usable = dataset.index[: section.limit].tolist()
    asked: Any = Subset(conversations, usable)
    require_answers(asked, section.metric)
    if encoder.truncation_strategy in ("left", "right"):  # a sample is cut to fit, a prompt is not
        short = [index for index in usable if encoder.prompt_length(conversations[index]) <= recipe.template.max_length]
        if len(short) < len(usable):
            logger.warning(
                "evaluation.data: %d of %d prompts are longer than template.max_length and are not asked.",
                len(usable) - len(short),
                len(usable),
            )
        usable = short
    return Subset(conversations, usable)


def coordinate_options(recipe: Recipe, conversations: Any) -> dict[str, Any]:
    """Return the options of the metric ``geometry`` that tell the unit of the coordinates in the answers.

    Dense captions have the unit of ``data.emit_norm``; in pixels each image has its own size. Other records are taken
    to be in thousandths, which Qwen3-VL writes.
    """
    scale = SCALES[recipe.data.emit_norm]
    images = [image.value for image in conversations[0].media(Image)]
    if not any(isinstance(image, DenseImage) for image in images):
        return {}
    if scale is not None:
        return {"scale": float(scale)}
    asked = (conversations[index] for index in range(len(conversations)))
    return {"sizes": [[image.value.stated for image in conversation.media(Image)] for conversation in asked]}


def build_model(recipe: Recipe, args: TrainingArguments, train_set: SampleDataset) -> nn.Module:
    """Load the model, freeze and adapt it, and set its training precision; adapters start from the run's seed."""
    model = load_model(_model_path(recipe), loading_options(recipe.model, recipe.quantization))
    set_seed(args.seed)  # after loading, which draws numbers for delta nets under ZeRO-3 and nowhere else
    batches = None
    if wants_data(recipe.tuner):
        if train_set.encoder.raw_pixels:
            use_raw_patches(model, train_set.encoder.processor.image_processor)
        model.to(args.device)
        batches = start_batches(recipe.tuner, train_set, args.seed)
    return prepared(model, recipe, args, batches=batches)


def prepared(model: nn.Module, recipe: Recipe, args: TrainingArguments, *, batches: Any = None) -> nn.Module:
    """Freeze and adapt a loaded model, and set its training precision.

    Args:
        batches: for starts of LoRA that look at data, from `start_batches`.
    """
    model = prepare_model(model, recipe.tuner, batches=batches)
    if (args.bf16 or args.fp16) and args.deepspeed is None:
        keep_float32(model, keep_adapter=recipe.tuner.lora_dtype is not None)
    return model


def start_batches(tuner: TunerConfig, train_set: SampleDataset, seed: int) -> list[dict[str, Any]]:
    """Draw the batches that a data-driven start of LoRA looks at; the same on every rank.

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
    """Convert every trainable weight to float32; autocast computes in the lower precision.

    AdamW at 1e-5 changes a bfloat16 weight by less than its last bit, so a model trained in plain bfloat16 loses most
    of its updates. DeepSpeed keeps a float32 copy of its own and needs no conversion.

    A LayerNorm of which only the bias trains (``tuner.lora_bias=all``) is converted whole, which changes no value: on a
    CPU, weight and bias must have the same dtype.

    Args:
        keep_adapter: leave LoRA's weights in the dtype that ``tuner.lora_dtype`` has set.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        whole = isinstance(module, nn.LayerNorm) and any(value.requires_grad for value in own.values())
        for name, parameter in own.items():
            if keep_adapter and ".lora_" in name:
                continue
            if (parameter.requires_grad or whole) and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


def _model_path(recipe: Recipe) -> str:
    """Return ``model.model``, a local folder as an absolute path: adapters record it as their base model."""
    if not recipe.model.model:
        raise RecipeError("model.model is not set. Give a directory or an id: model.model=Qwen/Qwen3-VL-4B-Instruct.")
    folder = Path(recipe.model.model)
    return str(folder.resolve()) if folder.is_dir() else recipe.model.model
