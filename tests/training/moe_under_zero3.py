"""Run by torchrun: loads MoE checkpoints under ZeRO-3 and prepares them; rank 0 writes what it sees."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moe_cases import facts_of

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.training.ranks import leave_ranks
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.whole import is_partitioned


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    under = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    values, refused, prepared = {}, {}, {}
    for name, checkpoint in asked["checkpoints"].items():
        try:
            model = load_model(checkpoint, torch_dtype="float32", attn_impl="sdpa")
        except CheckpointError as error:
            refused[name] = str(error)
            continue
        assert all(map(is_partitioned, model.parameters())), "vacuous: ZeRO-3 is off"
        weights = [(key, value) for key, value in model.named_parameters() if ".mlp." in key]
        with deepspeed.zero.GatheredParameters([value for _, value in weights]):
            values[name] = {key: value.detach().clone() for key, value in weights}
    for name, settings in asked["tuners"].items():
        model = load_model(asked["base"], torch_dtype="float32", attn_impl="sdpa")
        try:
            model = prepare_model(model, TunerConfig(**settings))
        except RecipeError as error:
            prepared[name] = str(error)
            continue
        prepared[name] = facts_of(model)
    if torch.distributed.get_rank() == 0:
        torch.save({"values": values, "refused": refused, "prepared": prepared}, folder / "out.pt")
    assert under.is_zero3()
    leave_ranks()


main()
