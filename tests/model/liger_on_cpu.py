"""Computes losses and gradients of models without and with Liger's kernels; run with TRITON_INTERPRET=1."""

import copy
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
from liger_kernel.ops import rms_norm
from peft import LoraConfig, get_peft_model
from triton import language
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import make_trainer

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.model.liger_kernels import LOSS, PIECES, use_liger
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.training.loss import loss_sum, split_labels, use_fused_loss

CPU = torch.device("cpu")
TEXT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for question, answer in (("One?", "a b c"), ("Two?", "it is so"))
]
LORA = {
    "lora": {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "lora on the head": {"target_modules": ["v_proj", "lm_head"]},
}


def as_compiled() -> None:
    """Add what the interpreter of triton 3.9 lacks: fractions passed as tensors, as compiled kernels get them, and the
    device's own square root."""
    rms_norm.rsqrt = lambda value: language.rsqrt(value)
    plain = interpreter._implicit_cvt

    def converted(value):
        if isinstance(value, float):
            return language.tensor(
                interpreter.TensorHandle(np.array([value], np.float32), language.float32), language.float32
            )
        return plain(value)

    interpreter._implicit_cvt = converted


def step(model, batch, **options):
    loss = loss_sum(model, batch, **options) * 0.5
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.item(), "grads": grads}


def fresh(folder, kind="full", *, checkpointing=False):
    """Load two layers only: the interpreter takes a millisecond for each row of each kernel."""
    torch.manual_seed(0)
    model = load_model(str(folder), torch_dtype="float32", attn_impl="packed_sdpa").train()
    model.model.language_model.layers = model.model.language_model.layers[:2]
    if kind in LORA:
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **LORA[kind]))
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def in_modules(model, batch, *, epsilon=None):
    """Compare Liger's norms, MLPs and rotations with the plain ones."""
    names = list(model.state_dict())
    results = {"plain": step(model, batch)}
    fused = use_liger(model, CPU)
    if epsilon is not None:
        model.model.language_model.layers[1].self_attn.k_norm.variance_epsilon = epsilon
    results["fused"] = step(model, batch)
    copied = copy.deepcopy(model)
    assert copied.model is not model.model
    return results | {"modules": fused.modules, "said": str(fused), "same names": list(model.state_dict()) == names}


def in_loss(model, batch, *, untied=False, **options):
    """Compare Liger's loss of the language head, over several chunks, with our own."""
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    weights = torch.linspace(0.5, 2, len(batch["targets"]), dtype=torch.float64)
    weighted = batch | {"target_weights": weights}
    results = {"plain": step(model, batch, **options), "plain, weighted": step(model, weighted, **options)}
    function = PIECES[LOSS].load()
    calls = []

    class Counted(function):
        @staticmethod
        def forward(ctx, *arguments):
            calls.append(arguments[0].shape[0])
            return function.forward(ctx, *arguments)

    Counted.forward.__signature__ = inspect.signature(function.forward)
    results["left"] = use_fused_loss(model, Counted)
    results["fused"] = step(model, batch, **options)
    with torch.no_grad():
        results["without gradients"] = loss_sum(model, batch, **options).item() * 0.5
    results["calls"] = list(calls)
    results["fused, weighted"] = step(model, weighted, **options)
    return results | {"calls with weights": len(calls) - len(results["calls"])}


def run(folder, checkpoint, encoder, **arguments):
    """Run a step of the trainer with some of the pieces; all layers are needed here, to match the checkpoint."""
    trainer = make_trainer(folder, checkpoint, encoder, records=TEXT, learning_rate=1e-1, optim="sgd", **arguments)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "said": "" if trainer.fused is None else str(trainer.fused)}


def main() -> None:
    dense, moe, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    as_compiled()
    torch.set_num_threads(1)
    encoder = Encoder(load_processor(dense))
    batch = split_labels(QwenVLCollator()([encoder(record) for record in TEXT]))
    only = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False, "rms_norm": False}}
    results = {
        "modules": {
            "full": in_modules(fresh(dense), batch),
            "lora": in_modules(fresh(dense, "lora", checkpointing=True), batch),
            "moe": in_modules(fresh(moe), batch),
            "broken": in_modules(fresh(dense), batch, epsilon=1.0),
        },
        "loss": {
            "tied": in_loss(fresh(dense), batch),
            "untied": in_loss(fresh(dense), batch, untied=True, label_smoothing=0.1, z_loss=1e-2),
            "frozen": in_loss(fresh(dense, "lora"), batch),
            "lora on the head": in_loss(fresh(dense, "lora on the head"), batch),
        },
        "run": {
            "plain": run(folder / "plain", dense, encoder),
            "fused": run(folder / "fused", dense, encoder, **only),
            "weighted": run(
                folder / "weighted", dense, encoder, trainer_options={"loss_weights": {"list": 2.0}}, **only
            ),
        },
    }
    torch.save(results, folder / "measured.pt")


main()
