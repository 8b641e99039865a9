"""Generated answers are the same in any batch, on any rank, equal plain transformers, and leave no trace."""

import copy
import json

import pytest
import torch
import torch.multiprocessing

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.evaluation.generate import evaluate, evaluate_exact_match, generate, plan_batches, prompt_batch
from qwenvl_ft.model.load import load_model

NEW_TOKENS = 24


def forward(model, batch):
    return model(**{key: value for key, value in batch.items() if key not in ("labels", "source")})


@pytest.fixture(scope="module")
def trained(checkpoints, encoder, mixed_records):
    """A model that has learned the mixed records by heart, so that its answers differ, and end."""
    torch.manual_seed(0)
    model = load_model(str(checkpoints["dense"]), torch_dtype="float32", attn_impl="sdpa")
    batch = QwenVLCollator()([encoder(record) for record in mixed_records])
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(forward(model, batch).logits[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, loss.item()
    return model.eval()


def plain_answer(model, processor, record):
    """Generate as transformers' own documentation does, for a `conversations` record with images or without media."""
    images = record["image"] if "image" in record else []
    images = iter(images if isinstance(images, list) else [images])
    messages = []
    for turn in record["conversations"][:-1]:
        pieces = turn["value"].split("<image>")
        content = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image", "image": next(images)}] if number else []
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
    answer = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return answer.split("<|im_end|>")[0].split("<|endoftext|>")[0]


def test_answers_are_those_of_plain_transformers(trained, processor, mixed_records):
    records = [record for record in mixed_records if "video" not in record]
    answers = generate(trained, processor, records, batch_size=len(records), max_new_tokens=NEW_TOKENS)
    assert answers == [plain_answer(trained, processor, record) for record in records]
    assert len(set(answers)) == len(records), "vacuous: the model says the same to everything"


def test_untrained_models_of_both_kinds_answer_as_plain_transformers_does(any_model, processor, mixed_records):
    records = [record for record in mixed_records if "video" not in record]
    answers = generate(any_model, processor, records, max_new_tokens=NEW_TOKENS)
    assert answers == [plain_answer(any_model, processor, record) for record in records]
    assert all(answers)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_gives_the_answers_of_each_prompt_alone(trained, processor, mixed_records, batch_size):
    records = [*mixed_records, *mixed_records[::-1]]
    alone = generate(trained, processor, records, batch_size=1, max_new_tokens=NEW_TOKENS)
    assert generate(trained, processor, records, batch_size=batch_size, max_new_tokens=NEW_TOKENS) == alone
    assert alone[:5] == alone[5:][::-1]


@pytest.mark.parametrize("attn_impl", ["eager", "packed_sdpa"])
def test_every_attention_gives_the_same_answers(trained, checkpoints, processor, mixed_records, attn_impl):
    model = load_model(str(checkpoints["dense"]), torch_dtype="float32", attn_impl=attn_impl)
    model.load_state_dict(trained.state_dict())
    answers = generate(model, processor, mixed_records, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert answers == [record["conversations"][-1]["value"] for record in mixed_records]


def test_a_learned_answer_is_generated_and_ends(trained, processor, mixed_records):
    result = evaluate_exact_match(trained, processor, mixed_records, max_new_tokens=NEW_TOKENS, batch_size=4)
    assert result["exact_match"] == 1.0
    assert result["count"] == len(mixed_records)
    assert result["wrong"] == []
    assert result["seconds"] > 0


def test_wrong_answers_are_counted_and_shown(trained, processor, mixed_records):
    records = copy.deepcopy(mixed_records[:2])
    records[1]["conversations"][-1]["value"] = "Goodbye."
    result = evaluate(trained, processor, records, max_new_tokens=NEW_TOKENS)
    assert result["exact_match"] == 0.5
    assert result["wrong"] == [{"source": "record", "answer": "Hello, hello there.", "expected": "Goodbye."}]
    assert evaluate(trained, processor, records, limit=1, max_new_tokens=NEW_TOKENS)["count"] == 1


def test_prompts_are_padded_on_the_left_and_padding_is_masked(trained, processor, encoder, mixed_records):
    samples = [encoder.prompt(record) for record in mixed_records]
    batch = prompt_batch(processor, samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert len(set(lengths)) > 1, "vacuous: nothing to pad"
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["mm_token_type_ids"] == 1).sum() == sum(s["image_grid_thw"].prod(1).sum() // 4 for s in samples[::2])
    positions, _ = trained.model.get_rope_index(**{k: v for k, v in batch.items() if not k.startswith("pixel")})
    for row, sample in enumerate(samples):
        torch.testing.assert_close(positions[:, row, -lengths[row] :], sample["position_ids"])


def test_the_model_is_restored(trained, processor, encoder, mixed_records):
    """Packed training goes on exactly: no offsets, no cache, no module in another mode."""
    model = copy.deepcopy(trained).train()
    model.model.visual.eval()
    batch = QwenVLCollator()([encoder(record) for record in mixed_records])
    before = forward(model, batch).logits
    modes = [module.training for module in model.modules()]

    generate(model, processor, mixed_records, batch_size=2, max_new_tokens=2)

    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2, "vacuous: all modules were in one mode"
    assert model.model.rope_deltas is None
    assert not model.config.use_cache
    assert not model.config.text_config.use_cache
    assert torch.equal(forward(model, batch).logits, before)


def test_the_model_is_restored_when_a_record_is_broken(tiny_model, processor, mixed_records):
    tiny_model.train()
    broken = {"image": "nowhere.png", "conversations": mixed_records[0]["conversations"]}
    with pytest.raises(DataError, match=r"nowhere\.png"):
        generate(tiny_model, processor, [mixed_records[0], broken], batch_size=1, max_new_tokens=1)
    assert all(module.training for module in tiny_model.modules())
    assert tiny_model.model.rope_deltas is None


def test_generation_reads_each_token_once(tiny_model, processor, mixed_records):
    """The cache is on while answers are written, though the config has it off."""
    widths = []
    hook = lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
    tiny_model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    generate(tiny_model, processor, mixed_records[:1], max_new_tokens=4)
    assert widths[0] > 1
    assert widths[1:] == [1] * (len(widths) - 1)
    assert len(widths) > 1


def test_weights_of_two_precisions_are_generated_with_as_in_training(trained, processor, mixed_records):
    """A frozen vision tower in bfloat16 under a trained language model in float32."""
    model = copy.deepcopy(trained)
    model.model.visual.blocks.bfloat16()
    with pytest.raises(RuntimeError):
        plain_answer(model, processor, mixed_records[0])
    try:
        answers = generate(model, processor, mixed_records, max_new_tokens=NEW_TOKENS)
    except RuntimeError as error:
        if "mixed dtype (CPU)" not in str(error):
            raise
        pytest.skip("this transformers gives blocks in bfloat16 float32, which torch normalises on CUDA alone")
    assert answers == [record["conversations"][-1]["value"] for record in mixed_records]


def test_sampling_follows_the_seed(tiny_model, processor, mixed_records):
    def draw(seed):
        torch.manual_seed(seed)
        return generate(tiny_model, processor, mixed_records, max_new_tokens=8, do_sample=True, temperature=5.0)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_one_kind_and_every_rank_has_the_same_number(world_size):
    kinds = [(False, False), (True, False), (True, False), (False, False), (True, True), (True, False)] * 3
    batches = plan_batches(kinds, 4, world_size)
    assert {index for batch in batches for index in batch} == set(range(len(kinds)))
    assert all(len({kinds[index] for index in batch}) == 1 for batch in batches)
    assert len(batches) % world_size == 0
    for step in range(0, len(batches), world_size):
        assert len({kinds[batch[0]] for batch in batches[step : step + world_size]}) == 1
    repeated = sum(len(batch) for batch in batches) - len(kinds)
    assert (repeated > 0) == (world_size > 1)


def _answer_in_a_group(rank, folder, checkpoint, records):
    import torch.distributed as dist

    from qwenvl_ft.model.load import load_processor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, passes = counting_passes(checkpoint)
    answers = generate(model, load_processor(checkpoint), records, batch_size=2, max_new_tokens=6)
    (folder / f"{rank}.json").write_text(json.dumps([answers, len(passes)]))
    dist.destroy_process_group()


def counting_passes(checkpoint):
    model = load_model(checkpoint, torch_dtype="float32", attn_impl="sdpa")
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    return model, passes


@pytest.mark.distributed
def test_two_ranks_share_the_work_and_both_return_every_answer(checkpoints, processor, mixed_records, tmp_path):
    checkpoint = str(checkpoints["dense"])
    records = [*mixed_records, *mixed_records, mixed_records[1]]
    model, passes = counting_passes(checkpoint)
    alone = generate(model, processor, records, batch_size=2, max_new_tokens=6)
    torch.multiprocessing.spawn(_answer_in_a_group, (tmp_path, checkpoint, records), nprocs=2)
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [answers for answers, _ in shares] == [alone, alone]
    assert max(count for _, count in shares) < len(passes), "vacuous: each process did all the work"


def test_records_that_cannot_be_evaluated_are_errors(tiny_model, processor, mixed_records):
    question = {"conversations": mixed_records[1]["conversations"][:1]}
    with pytest.raises(DataError, match="must end with the assistant's answer"):
        evaluate_exact_match(tiny_model, processor, [question])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_exact_match(tiny_model, processor, [])
    with pytest.raises(DataError, match=r"evaluation.limit=0"):
        evaluate_exact_match(tiny_model, processor, mixed_records, limit=0)
    for key in ("batch_size", "max_new_tokens"):
        with pytest.raises(RecipeError, match=f"evaluation.{key}=0"):
            generate(tiny_model, processor, mixed_records, **{key: 0})
