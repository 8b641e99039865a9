"""SDPA per sample gives every sample of a row the results that it has alone, forward and backward, without a mask."""

import inspect

import pytest
import torch
from cases import KINDS, gradient_tolerance
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model import packed_attention
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.packed_attention import Plan, make_plan, use_packed_attention

PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    """Return samples with one image, several, a video and none, one of them twice, so that lengths repeat."""
    return [encoder(record) for record in [*mixed_records, mixed_records[0], mixed_records[1]]]


def inputs(batch):
    return {key: batch[key] for key in ("input_ids", "position_ids", *PIXELS) if key in batch}


def loss_of(model, batch):
    """Return the loss summed over supervised tokens, so that the samples' losses add up to the row's."""
    logits, labels = model(**inputs(batch)).logits[0, :-1], batch["labels"][0, 1:]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def close_in_norm(found, expected):
    for name, grad in expected.items():
        difference = (found[name] - grad).norm() / grad.norm().clamp_min(1e-9)
        assert difference < gradient_tolerance(name) or (found[name] - grad).abs().max() < 1e-9, (
            name,
            difference.item(),
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_its_samples_alone(checkpoints, samples, kind, checkpointing):
    collate = QwenVLCollator()
    alone = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="eager").train()
    packed = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="packed_sdpa").train()
    if checkpointing:
        packed.activation_checkpointing_enable()
    losses = [loss_of(alone, collate([sample])) for sample in samples]
    torch.stack(losses).sum().backward()
    row = collate(samples)
    loss = loss_of(packed, row)
    loss.backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    assert gradients(packed).keys() == gradients(alone).keys()
    close_in_norm(gradients(packed), gradients(alone))
    with torch.no_grad():
        separate = torch.cat([alone(**inputs(collate([sample]))).logits for sample in samples], dim=1)
        for model in (packed, packed.eval()):
            torch.testing.assert_close(model(**inputs(row)).logits, separate, rtol=1e-5, atol=1e-5)
        mixed = packed(**(inputs(row) | {"position_ids": row["position_ids"][1:]})).logits
    assert not torch.allclose(mixed, separate, atol=1e-3), "vacuous: samples may see one another"


def test_borders_may_come_as_cu_seq_lens(checkpoints, samples):
    model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="packed_sdpa")
    row = QwenVLCollator()(samples)
    lengths = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)])
    borders = lengths.cumsum(0).to(torch.int32)
    flash = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    flash |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
    with torch.no_grad():
        expected = model(**inputs(row)).logits
        torch.testing.assert_close(model(**inputs(row), **flash).logits, expected)
        with pytest.raises(ValueError, match="but the batch has"):
            model(**inputs(row), cu_seq_lens_q=borders[:-1])


def reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """A reference kernel with the signature of torch 2.11's, computed sample by sample with a softmax in float64."""
    assert cu_seq_q is cu_seq_k, "cuDNN needs the same tensor"
    assert cu_seq_q.dtype == torch.int32
    assert query.shape == key.shape == value.shape
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    assert sum(lengths) == query.shape[0]
    outs = []
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        if window_size == (-1, 0):
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs).to(query.dtype)


def grouped_kernel(query, key, value, *more, enable_gqa=False, **options):
    """The reference kernel with the signature of torch 2.12 and later, which does not need repeated keys."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return reference_kernel(query, key, value, *more, **options)


@pytest.mark.parametrize("kernel", [reference_kernel, grouped_kernel])
def test_the_kernel_for_unequal_lengths_is_called_as_it_wants_to_be(checkpoints, samples, monkeypatch, kernel):
    """With a reference for the kernel, which needs a GPU: text is causal, images are not, both get their borders."""
    calls = []

    def counted(*args, **options):
        calls.append(options.get("window_size"))
        return kernel(*args, **options)

    counted.__signature__ = inspect.signature(kernel)
    model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="packed_sdpa")
    text = model.config.text_config
    assert text.num_attention_heads != text.num_key_value_heads, "vacuous: no keys are shared"
    row = {key: value for key, value in QwenVLCollator()(samples).items() if key not in ("labels", "sources")}
    expected = loss_of(model, QwenVLCollator()(samples))
    expected.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    monkeypatch.setattr(packed_attention, "_kernel", lambda: counted)
    monkeypatch.setattr(packed_attention, "_kernel_dtype", lambda value: torch.float32)
    batch = QwenVLCollator()(samples)
    logits = model(**row).logits[0, :-1]
    found = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum", ignore_index=-100)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    close_in_norm(gradients(model), wanted)
    layers, blocks = text.num_hidden_layers, model.config.vision_config.depth
    assert calls.count((-1, 0)) == layers
    assert calls.count(None) == 2 * blocks, "images and videos"


def test_values_do_not_keep_the_queries_and_keys_of_their_block():
    """The vision tower computes all three in one product, and rotates queries and keys but not values."""
    tokens, heads, size = 48, 4, 16
    borders = torch.tensor([0, 16, 32, 48], dtype=torch.int32)
    module = torch.nn.Module()
    module.is_causal = False
    kept = {}
    for name, attend in (("ours", packed_attention.packed_attention), ("plain", sdpa_attention_forward)):
        block = torch.randn(tokens, 3, heads, size, requires_grad=True) * 1
        query, key, value = block.permute(1, 2, 0, 3)[:, None].unbind(0)  # [1, H, T, D]
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(module, query * 1, key * 1, value, None, cu_seq_lens_q=borders, scaling=0.25)
        kept[name] = sum(storages.values())
    one = tokens * heads * size * 4
    assert kept["ours"] < 4.5 * one, "queries, keys, values, output, and a number for each row"
    assert kept["plain"] > 6 * one, "vacuous: nothing keeps the block"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("causal", "heads", "size"), [(True, (8, 2), 128), (False, (16, 16), 72), (False, (16, 16), 64)]
)
def test_the_kernel_equals_sdpa_in_float64(causal, heads, size):
    """In bfloat16 on the GPU, the error against float64 is as small as that of SDPA on each sample alone."""
    torch.manual_seed(0)
    lengths = [700, 3, 129, 1, 64]
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    exact = [
        torch.randn(1, h, sum(lengths), size, device="cuda", dtype=torch.float64) for h in (heads[0], *heads[1:] * 2)
    ]
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, heads[0] // heads[1]
    results = {}
    for name, dtype, options in (
        ("float64", torch.float64, {}),
        ("kernel", torch.bfloat16, {"max_length_q": max(lengths)}),
    ):
        q, k, v = (x.to(torch.bfloat16).to(dtype).requires_grad_() for x in exact)
        out, _ = packed_attention.packed_attention(
            module, q, k, v, None, cu_seq_lens_q=borders, is_causal=causal, scaling=size**-0.5, **options
        )
        out.double().square().sum().backward()
        results[name] = (out.double(), q.grad.double(), k.grad.double(), v.grad.double())
    for found, expected in zip(results["kernel"], results["float64"], strict=True):
        assert (found - expected).norm() / expected.norm() < 0.02


def test_borders_are_found_once_a_tower_and_no_mask_is_built(checkpoints, samples, monkeypatch):
    model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="packed_sdpa")
    row, made = inputs(QwenVLCollator()(samples[:3])), []
    monkeypatch.setattr(packed_attention, "make_plan", lambda *args: made.append(args) or make_plan(*args))

    def no_mask(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(masking_utils, "sdpa_mask", no_mask)
    with torch.no_grad():
        model(**row)
    assert len(made) == 2, "one plan for the text, one for the images, whatever the layers"


def test_padded_batches_and_generation_are_those_of_sdpa(checkpoints, processor):
    texts = ["Say hello.", "What is a small red circle to the left of a large blue square?"]
    batch = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert not batch["attention_mask"].all(), "vacuous: nothing is padded"
    outputs = []
    for name in ("sdpa", "packed_sdpa"):
        model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl=name).eval()
        generated = model.generate(**batch, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
        with torch.no_grad():
            outputs.append((generated.sequences, torch.stack(generated.logits), model(**batch).logits))
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_row_of_a_batch_has_its_own_borders(checkpoints):
    ids = torch.arange(5, 21).view(2, 8)
    text = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]])
    positions = text.expand(4, 2, 8)
    logits = {
        name: load_model(checkpoints["dense"], torch_dtype="float32", attn_impl=name)(
            input_ids=ids, position_ids=positions
        ).logits
        for name in ("sdpa", "packed_sdpa")
    }
    torch.testing.assert_close(logits["packed_sdpa"], logits["sdpa"], rtol=1e-5, atol=1e-5)
    plain = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="sdpa")(input_ids=ids).logits
    assert not torch.allclose(logits["sdpa"], plain, atol=1e-3), "vacuous: the borders change nothing"


def test_a_saved_model_does_not_remember_it(checkpoints, tmp_path):
    load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="packed_sdpa").save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_older_families_attend_per_image_too(model_type):
    """Qwen2.5-VL alternates between whole images and windows, so two neighbouring layers have different borders."""
    config = CONFIG_MAPPING[model_type]()
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size = 1, 64, 64, 64
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 4, 2, ["full_attention"]
    vision.depth, vision.num_heads, vision.intermediate_size = 3, 2, 64
    if model_type == "qwen2_vl":
        vision.embed_dim, vision.hidden_size = 64, 64
    else:
        vision.hidden_size, vision.out_hidden_size, vision.fullatt_block_indexes = 64, 64, [1]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    grid = torch.tensor([[1, 12, 8], [1, 4, 6], [2, 12, 8], [1, 6, 4]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    with torch.no_grad():
        expected = model.model.visual(patches, grid_thw=grid).pooler_output
        use_packed_attention(model)
        found = model.model.visual(patches, grid_thw=grid).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_equal_lengths_are_grouped():
    plan = make_plan([3, 2, 3])
    assert plan.groups == [(2, 3), (1, 2)]
    assert plan.order.tolist() == [0, 1, 2, 5, 6, 7, 3, 4]
    assert plan.order[plan.inverse].tolist() == list(range(8))
    assert make_plan([4, 4, 2]) == Plan([(2, 4), (1, 2)], None, None), "in order already: nothing to move"
    assert make_plan([0, 5]).is_one_sample
    assert not make_plan([5, 5]).is_one_sample
