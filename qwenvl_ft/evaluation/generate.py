"""Generates answers to the prompts of an eval set and compares them with the answers in the records.

Prompts are encoded exactly as in training. Letters: B prompts of a batch, T tokens of the longest prompt, N new tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qwenvl_ft.data.collate import MEDIA
from qwenvl_ft.data.conversation import Conversation, Image, Sample, Source, Text, Video
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.evaluation.metrics import Metric, metric_of, require_readable

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Tokens that end an answer and are not part of it, as in the released generation config."""
MEDIA_TOKENS = (("<|image_pad|>", 1), ("<|video_pad|>", 2))
"""(placeholder, its value in ``mm_token_type_ids``), by which transformers finds the media; text is 0."""
MAX_WRONG = 20
"""Maximum number of wrong answers that `evaluate` returns as examples."""

Progress = Callable[[int, int], None]


def generate(
    model: nn.Module,
    processor: Any,
    conversations: Sequence[Any],
    *,
    encoder: Encoder | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 50,
    progress: Progress | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    together: Callable[[Callable[[], Any]], Any] = lambda action: action(),
) -> list[str]:
    """Generate an answer to each conversation, in place of its last assistant turn.

    The model's state is restored afterwards: the training mode of every module, ``use_cache``, and no position offsets
    are left from generation. With several ranks, each rank generates a share of the answers, and every rank
    returns all of them in order.

    Args:
        conversations: records in any format, `Conversation` s, or a `Records`.
        encoder: encodes the prompts (system prompt, media policy, ...); None for the defaults.
        do_sample: sample with ``temperature``, ``top_p`` and ``top_k`` instead of greedy decoding.
        progress: called with (batches done, number of batches) on every rank; may raise to stop.
        interrupted: asked after each token; True ends the batch's answers there, for a ``progress`` that raises.
        together: calls the function that encodes a batch of prompts; with several ranks, one that raises its errors
            on all of them.

    Raises:
        DataError: a record is malformed, or its prompt is longer than the encoder's ``max_length``.
    """
    if batch_size < 1:
        raise RecipeError(f"evaluation.batch_size={batch_size} is below 1. Set it to 1 or more prompts.")
    if max_new_tokens < 1:
        raise RecipeError(f"evaluation.max_new_tokens={max_new_tokens} is below 1. Set it to 1 or more tokens.")
    encoder = encoder or Encoder(processor)
    settings = _settings(processor, max_new_tokens)
    settings.update(do_sample=do_sample, temperature=temperature, top_p=top_p, top_k=top_k)
    batches = plan_batches([_kinds(_read(item)) for item in conversations], batch_size, _world_size())
    answers: dict[int, str] = {}
    with _inference(model):
        mine = batches[_rank() :: _world_size()]
        for done, batch in enumerate(mine, start=1):
            samples = together(partial(_prompts, encoder, conversations, batch))
            answers |= zip(batch, _answer(model, processor, samples, settings, interrupted), strict=True)
            if progress is not None:
                progress(done, len(mine))
    gathered = _gather(answers)
    return [gathered[index] for index in range(len(conversations))]


def greedy_tokens(model: nn.Module, processor: Any, sample: Sample, max_new_tokens: int) -> tuple[list[int], Tensor]:
    """Answer one encoded prompt by greedy decoding.

    Returns:
        The N new tokens, with the stop token if there is one, and the log-probabilities at each, float32[N, V], where V
        is the size of the vocabulary.
    """
    settings = _settings(processor, max_new_tokens)
    settings.update(do_sample=False, return_dict_in_generate=True, output_logits=True)
    with _inference(model):
        device = next(model.parameters()).device
        batch = {key: tensor.to(device) for key, tensor in prompt_batch(processor, [sample]).items()}
        done = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
    tokens = done.sequences[0, batch["input_ids"].shape[1] :].tolist()
    return tokens, torch.stack(done.logits)[:, 0].float().log_softmax(-1).cpu()


def evaluate(
    model: nn.Module,
    processor: Any,
    records: Sequence[Any],
    *,
    metric: str = "exact_match",
    metric_options: dict[str, Any] | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generate the last assistant turn of each record and compare it with the record's own.

    Args:
        metric: a name in ``METRICS``.
        metric_options: options of the metric, e.g. ``{"ignore_case": True}``.
        limit: evaluate only the first ``limit`` records; None for all.
        options: passed to `generate`.

    Returns:
        The metric's primary score under its name; ``scores``, all that it computes; ``count``, the number of records;
        ``wrong``, up to 20 of those whose answer, scored by itself, is not perfect, as ``source``, ``answer`` and
        ``expected``; ``seconds``.

    Raises:
        DataError: there are no records, or one does not end with an answer.
    """
    chosen, settings = metric_of(metric), metric_options or {}
    start = time.perf_counter()
    count = len(records) if limit is None else min(len(records), limit)
    if count < 1:
        raise DataError(f"there is nothing to evaluate: {len(records)} records, evaluation.limit={limit}.")
    asked: Any = Subset(records, range(count))  # type: ignore[arg-type]
    expected = [expected_answer(_read(asked[index])) for index in range(count)]
    answers = generate(model, processor, asked, **options)
    scores = chosen.score(expected, answers, **settings)
    wrong = islice(
        (index for index in range(count) if not _right(chosen, expected, answers, index, settings)), MAX_WRONG
    )
    return {
        metric: scores[chosen.primary],
        "scores": scores,
        "count": count,
        "wrong": [
            {"source": str(_read(asked[index]).source), "answer": answers[index], "expected": expected[index]}
            for index in wrong
        ],
        "seconds": time.perf_counter() - start,
    }


def _right(metric: Metric, expected: list[str], answers: list[str], index: int, options: dict[str, Any]) -> bool:
    """Return True if one answer, scored by itself, is perfect."""
    own = {name: [value[index]] if isinstance(value, list) else value for name, value in options.items()}
    return metric.is_perfect(metric.score([expected[index]], [answers[index]], **own))


def evaluate_exact_match(model: nn.Module, processor: Any, records: Sequence[Any], **options: Any) -> dict[str, Any]:
    """Run `evaluate` with exact match, ignoring white space at both ends."""
    return evaluate(model, processor, records, metric="exact_match", **options)


def expected_answer(conversation: Conversation) -> str:
    """Return the text of the last turn, which must be the assistant's.

    Raises:
        DataError: the last turn is not the assistant's.
    """
    last = conversation.messages[-1] if conversation.messages else None
    if last is None or last.role != "assistant":
        raise DataError(
            f"{conversation.source}: the record ends with {last.role if last else 'nothing'!r}. "
            "To be evaluated, it must end with the assistant's answer."
        )
    return "".join(part.text for part in last.content if isinstance(part, Text))


def require_answers(records: Sequence[Any], metric: str = "exact_match") -> None:
    """Raise unless every record ends with an answer that the metric can read; called before anything is generated.

    Raises:
        DataError: a record does not; the message names the first.
    """
    for index in range(len(records)):
        conversation = _read(records[index])
        require_readable(metric, expected_answer(conversation), str(conversation.source))


def plan_batches(kinds: Sequence[tuple[bool, ...]], batch_size: int, world_size: int = 1) -> list[list[int]]:
    """Split indices into batches so that rank r takes batches r, r + ``world_size``, and so on.

    Sharded models gather each module's weights on all ranks together, so all ranks must run the same modules at the
    same time. Therefore a batch only holds conversations with the same kinds of media, and the last batch of each kind
    is repeated until every rank has one.

    Example:
        Five text prompts in twos, for two ranks: ``[[0, 1], [2, 3], [4], [4]]``.
    """
    batches: list[list[int]] = []
    for kind in dict.fromkeys(kinds):
        same = [index for index, other in enumerate(kinds) if other == kind]
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
        batches += [batches[-1]] * (-len(batches) % world_size)
    return batches


def prompt_batch(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Batch prompts of unequal lengths, padded on the left so that all answers begin at the same position.

    Returns:
        ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` int64[B, T], and all media in order.
    """
    tokenizer = processor.tokenizer
    pad_id = tokenizer.pad_token_id
    ids = [sample["input_ids"] for sample in samples]
    rows = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left")
    ones = [torch.ones_like(row) for row in ids]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
    types = torch.zeros_like(rows)
    for token, number in MEDIA_TOKENS:
        types[rows == tokenizer.convert_tokens_to_ids(token)] = number
    batch = {"input_ids": rows, "attention_mask": mask, "mm_token_type_ids": types}
    for key in [key for keys in MEDIA for key in keys]:
        tensors = [sample[key] for sample in samples if key in sample]  # type: ignore[literal-required]
        if tensors:
            batch[key] = torch.cat(tensors)
    return batch


def _prompts(encoder: Encoder, conversations: Sequence[Any], batch: Sequence[int]) -> list[Sample]:
    return [encoder.prompt(_read(conversations[index])) for index in batch]


def _answer(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: GenerationConfig,
    interrupted: Callable[[], bool],
) -> list[str]:
    device = next(model.parameters()).device
    batch = {key: tensor.to(device) for key, tensor in prompt_batch(processor, samples).items()}
    stops = StoppingCriteriaList([_Interruption(interrupted)])
    tokens = model.generate(**batch, generation_config=settings, stopping_criteria=stops)  # [B, T + N]
    new = tokens[:, batch["input_ids"].shape[1] :].tolist()
    return [processor.tokenizer.decode(_until_stop(row, settings.eos_token_id)) for row in new]


class _Interruption(StoppingCriteria):
    """Ends all answers of a batch once a function returns True."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self.interrupted = interrupted

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """Return bool[B]."""
        return torch.full((len(input_ids),), self.interrupted(), dtype=torch.bool, device=input_ids.device)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token; padding follows it."""
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def _settings(processor: Any, max_new_tokens: int) -> GenerationConfig:
    tokenizer = processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS],
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Prepare the model for generation, and restore its state afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), _common_precision(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
            if "rope_deltas" in vars(module):  # position offsets of the last batch, which a later pass would use
                module.rope_deltas = None  # type: ignore[assignment]


def _common_precision(model: nn.Module) -> Any:
    """Return an autocast to the lowest precision of the weights if they have several, as in training.

    Trained weights are often in float32 beside frozen ones in bfloat16. With a single precision nothing is cast.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    lower = sorted(dtypes & {torch.bfloat16, torch.float16}, key=str)
    if len(dtypes) < 2 or not lower:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=lower[0])


def _read(item: Any) -> Conversation:
    if isinstance(item, Conversation):
        return item
    if isinstance(item, dict):
        return read_record(item, Source("record", "record", str(item.get("id", ""))), None)
    record, source, media_root = item
    return read_record(record, source, media_root)


def _kinds(conversation: Conversation) -> tuple[bool, bool]:
    return bool(conversation.media(Image)), bool(conversation.media(Video))


def _rank() -> int:
    return dist.get_rank() if _several() else 0


def _world_size() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(answers: dict[int, str]) -> dict[int, str]:
    """Return the answers of all ranks, on every rank."""
    if not _several():
        return answers
    shares: list[Any] = [None] * _world_size()
    dist.all_gather_object(shares, answers)
    return {index: answer for share in shares for index, answer in share.items()}
