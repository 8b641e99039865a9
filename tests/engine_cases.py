"""The rules by which vLLM 0.33 and SGLang 0.5.23 load models and adapters, stated again after reading their loaders.

The tensors of delta nets, shared experts and vision towers follow vLLM 0.32 alone (qwen3_5.py, qwen3_next.py,
qwen3_vl.py).

A rule that leaves a tensor out does so here too; an error of an engine is a LookupError here. Updates are returned as
name of a released weight -> what is added to it.
"""

import json
import math
import re

import torch
from safetensors.torch import load_file

PREFIXES = {"model.visual.": "visual.", "model.language_model.": "", "lm_head.": "lm_head."}
"""Where a stored name begins -> where it begins in the engines' model, without ``language_model.model.``."""
STACKED = {
    r"(self_attn\.)([qkv])_proj": r"\1qkv_proj=\2",
    r"(mlp\.|shared_expert\.)gate_proj": r"\1gate_up_proj=0",
    r"(mlp\.|shared_expert\.)up_proj": r"\1gate_up_proj=1",
    r"(experts\.)gate_up_proj": r"\1w13=w1,w3",
    r"(experts\.)down_proj": r"\1w2=w2",
    r"(linear_attn\.)in_proj_qkv": r"\1in_proj_qkvz=0,1,2",
    r"(linear_attn\.)in_proj_z": r"\1in_proj_qkvz=3",
    r"(linear_attn\.)in_proj_b": r"\1in_proj_ba=0",
    r"(linear_attn\.)in_proj_a": r"\1in_proj_ba=1",
}
"""End of a stored name -> parameter that joins several, and the shards of it that are filled."""


def shards_of(config):
    """Return parameter of the engines' model -> the shards that fill it: tower, aligner, all layers and the head."""
    text = config["text_config"]
    whole = ["embed_tokens", "norm", *_tower(config["vision_config"])]
    whole += [] if config["tie_word_embeddings"] else ["lm_head"]
    wanted = {}
    for number in range(text["num_hidden_layers"]):
        layer = f"layers.{number}."
        whole += [layer + "input_layernorm", layer + "post_attention_layernorm"]
        if text.get("layer_types", {number: ""})[number] == "linear_attention":
            wanted[layer + "linear_attn.in_proj_qkvz"], wanted[layer + "linear_attn.in_proj_ba"] = (
                set("0123"),
                set("01"),
            )
            whole += [f"{layer}linear_attn.{name}" for name in ("conv1d", "dt_bias", "A_log", "norm", "out_proj")]
        else:
            wanted[layer + "self_attn.qkv_proj"] = set("qkv")
            whole += [f"{layer}self_attn.{name}" for name in ("q_norm", "k_norm", "o_proj")]
        mlp = layer + "mlp."
        if "num_experts" in text:
            whole.append(mlp + "gate")
            wanted[mlp + "experts.w13"], wanted[mlp + "experts.w2"] = {"w1", "w3"}, {"w2"}
            if "shared_expert_intermediate_size" not in text:
                continue
            whole.append(mlp + "shared_expert_gate")
            mlp += "shared_expert."
        wanted[mlp + "gate_up_proj"] = set("01")
        whole.append(mlp + "down_proj")
    return wanted | {name: {"whole"} for name in whole}


def _tower(vision):
    """Return the parameters of vision tower and aligner; nothing is joined that is stored apart."""
    linears = ["visual.patch_embed.proj"]
    for number in range(vision["depth"]):
        parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
        linears += [f"visual.blocks.{number}.{part}" for part in parts]
    mergers = [f"deepstack_merger_list.{number}" for number, _ in enumerate(vision.get("deepstack_visual_indexes", ()))]
    for merger in ("merger", *mergers):
        linears += [f"visual.{merger}.{part}" for part in ("norm", "linear_fc1", "linear_fc2")]
    return ["visual.pos_embed", *linears, *(f"{name}.bias" for name in linears)]


def landed(names):
    """Return (parameter -> shards, names that land nowhere) of a model's weights."""
    filled, left = {}, []
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            left.append(name)
            continue
        own = (PREFIXES[prefix] + name.removeprefix(prefix)).removesuffix(".weight")
        for end, joined in STACKED.items():
            own = re.sub(f"{end}$", joined, own)
        parameter, _, shards = own.partition("=")
        filled.setdefault(parameter, set()).update(shards.split(",") if shards else ["whole"])
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
