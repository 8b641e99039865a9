"""The rules by which vLLM 0.33 and SGLang 0.5.23 load models and adapters, stated again after reading their loaders.

A rule that leaves a tensor out does so here too; an error of an engine is a LookupError here. Updates are returned as
name of a released weight -> what is added to it.
"""

import json
import math
import re

import torch
from safetensors.torch import load_file


def shards_of(config):
    """Return parameter of the engines' text model -> the shards that fill it, for all layers and the head."""
    text = config["text_config"]
    wanted = {"embed_tokens": {"whole"}, "norm": {"whole"}}
    if not config["tie_word_embeddings"]:
        wanted["lm_head"] = {"whole"}
    for number in range(text["num_hidden_layers"]):
        layer = f"layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            wanted[layer + name] = {"whole"}
        wanted[layer + "self_attn.qkv_proj"] = {"q", "k", "v"}
        wanted[layer + "self_attn.o_proj"] = {"whole"}
        if "num_experts" in text:
            wanted[layer + "mlp.gate"] = {"whole"}
            wanted[layer + "mlp.experts.w13"], wanted[layer + "mlp.experts.w2"] = {"w1 and w3"}, {"w2"}
        else:
            wanted[layer + "mlp.gate_up_proj"], wanted[layer + "mlp.down_proj"] = {"0", "1"}, {"whole"}
    return wanted


def landed(names, model_prefix):
    """Return (parameter -> shards, names that land nowhere) of a model's text weights.

    Args:
        model_prefix: where the stored names have the text model; engines replace it.
    """
    filled, left = {}, []
    for name in names:
        own = name.removesuffix(".weight")
        if own != "lm_head":
            if not own.startswith(model_prefix):
                left.append(name)
                continue
            own = own.removeprefix(model_prefix)
        joined = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.qkv_proj=\1", own)
        joined = re.sub(r"mlp\.gate_proj$", "mlp.gate_up_proj=0", joined)
        joined = re.sub(r"mlp\.up_proj$", "mlp.gate_up_proj=1", joined)
        joined = re.sub(r"mlp\.experts\.gate_up_proj$", "mlp.experts.w13=w1 and w3", joined)
        joined = re.sub(r"mlp\.experts\.down_proj$", "mlp.experts.w2=w2", joined)
        parameter, _, shard = joined.partition("=")
        filled.setdefault(parameter, set()).add(shard or "whole")
    return filled, left


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def vllm_updates(folder, *, tower=False):
    """Apply an adapter as vLLM does. tower: started with --enable-tower-connector-lora."""
    config, saved = read(folder)
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise LookupError("not supported")
    pairs = {}
    for name, value in saved.items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise LookupError(name)
        pairs.setdefault(match[1], {})[match[2]] = value
    updates = {}
    for module, pair in pairs.items():
        if module.endswith(".in_proj_z") and module.replace("_z", "_qkv") not in pairs:
            raise LookupError(f"rows of {module}")
        if module.startswith("model.visual.") and not tower:
            continue
        scaled = module.replace(".experts.base_layer", ".experts.gate_up_proj")
        scaled += ".down_proj" if scaled.endswith(".experts") else ""
        rank = _by_pattern(config["rank_pattern"], scaled, config["r"])
        alpha = _by_pattern(config["alpha_pattern"], scaled, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        if module.endswith((".experts", ".experts.base_layer")):
            layer = module.removesuffix(".base_layer")
            if layer not in pairs or f"{layer}.base_layer" not in pairs:
                raise LookupError(f"half of {layer}")
            count = pair["A"].shape[0] // rank
            down = pair["A"].reshape(count, rank, -1)
            up = pair["B"].reshape(pair["B"].shape[0], rank, count).permute(2, 0, 1)
            updates[scaled] = scale * (up @ down).transpose(1, 2)
        else:
            updates[f"{module}.weight"] = scale * pair["B"] @ pair["A"]
    return updates


def sglang_updates(folder, experts=0):
    """Apply an adapter as SGLang does. experts: number of experts of a layer."""
    config, saved = read(folder)
    if config.get("use_dora"):
        raise LookupError("DoRA")
    if not isinstance(config["target_modules"], list):
        raise LookupError("a pattern")
    joined = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    joined |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    ends = [name.rpartition(".")[2] for name in config["target_modules"]]
    targets = {joined.get(end, end) for end in ends}
    scale, layers, updates = config["lora_alpha"] / config["r"], {}, {}
    for name, value in saved.items():
        number = re.search(r"layers\.(\d+)\.", name)
        if number:
            layers.setdefault(number[1], {})[name] = value
        elif "lm_head" in name and "lm_head" in targets:
            layers.setdefault("head", {})[name] = value
    for values in layers.values():
        modules = {name.partition(".lora_")[0] for name in values}
        for module in modules:
            end = module.rpartition(".")[2]
            matches = [target for target in targets if target in module.replace(end, joined.get(end, end))]
            beside = {other.rpartition(".")[2] for other in modules}
            if end in ("k_proj", "v_proj") and "q_proj" not in beside:
                continue
            if end == "q_proj" and "v_proj" not in beside:
                raise LookupError("v_proj")
            if end == "up_proj" and "gate_proj" not in beside:
                continue
            if end.startswith("in_proj_"):  # its joined weight is made of in_proj_q, _k, _v and _z
                continue
            routed = ".experts." in module or module.endswith(".experts")
            if not matches or (experts and ".mlp." in module and not routed):
                continue
            if routed and not (re.search(r"experts\.\d+\.", module) and {"gate_up_proj", "down_proj"} <= targets):
                continue
            down, up = (values[f"{module}.lora_{side}.weight"] for side in "AB")
            if down.shape[0] != config["r"]:
                raise LookupError(f"rank of {module}")
            updates[module.removeprefix("base_model.model.") + ".weight"] = scale * up @ down
    return _joined_experts(updates)


def _joined_experts(updates):
    """Return the updates with those of single experts joined as a released model stores them, [E, in, out]."""
    result = {name: value for name, value in updates.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in updates if ".experts." in name}
    for layer in layers:
        part = lambda number, end: updates[f"{layer}.experts.{number}.{end}.weight"]  # noqa: B023, E731
        count = sum(name.startswith(f"{layer}.experts.") and name.endswith("down_proj.weight") for name in updates)
        both = [torch.cat([part(n, "gate_proj"), part(n, "up_proj")]) for n in range(count)]
        result[f"{layer}.experts.gate_up_proj"] = torch.stack(both).transpose(1, 2)
        result[f"{layer}.experts.down_proj"] = torch.stack([part(n, "down_proj") for n in range(count)]).transpose(1, 2)
    return result


def _by_pattern(patterns, name, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
