"""Fixtures of the tuning tests: a batch with images and text, a loss, a few optimizer steps, and tuner sections."""

import pytest
import torch
from PIL import Image

from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.optimizer import param_groups


@pytest.fixture
def fresh(checkpoints):
    """Load a new float32 model: ``fresh()``, ``fresh("moe")``."""

    def load(kind="dense", **options):
        return load_model(checkpoints[kind], **({"torch_dtype": "float32", "attn_impl": "sdpa"} | options))

    return load


@pytest.fixture
def tuner():
    """Build a tuner section, by default with everything unfrozen and no dropout."""

    def make(**values):
        unfrozen = {"freeze_llm": False, "freeze_vit": False, "freeze_aligner": False, "lora_dropout": 0.0}
        return TunerConfig(**(unfrozen | values))

    return make


@pytest.fixture(scope="session")
def batch(processor):
    """Return one conversation with two images, encoded by the processor: all parts of the model take part."""
    pictures = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((96, 64), (64, 64))]
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A blur."}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs)


@pytest.fixture(scope="session")
def logits(batch):
    """Return a model's logits for the batch, without gradients, in eval mode."""

    def compute(model):
        model.eval()
        with torch.no_grad():
            return model(**batch).logits

    return compute


@pytest.fixture(scope="session")
def loss(batch):
    """Return the next-token loss of a model on the batch."""

    def compute(model):
        logits = model(**batch).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch["input_ids"][0, 1:])

    return compute


@pytest.fixture(scope="session")
def train(loss):
    """Take optimizer steps without weight decay, so that only gradients change weights."""

    def steps(model, count=3, rate=1e-2):
        model.train()
        optimizer = torch.optim.AdamW(param_groups(model, learning_rate=rate, weight_decay=0.0))
        for _ in range(count):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return model

    return steps
