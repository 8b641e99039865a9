"""Precedence of values: extends in all its forms, deep merges, overrides, origins."""

import random

import pytest
from omegaconf import OmegaConf

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe


def lora(recipe):
    return recipe.tuner.lora_rank, recipe.tuner.lora_alpha, recipe.tuner.lora_dropout


@pytest.mark.parametrize("key", ["extends", "inherit"])
def test_a_file_overrides_the_one_it_extends_and_keeps_the_rest(write, key):
    write("base.yaml", "tuner: {lora_rank: 3, lora_alpha: 5}")
    top = write("top.yaml", f"{key}: base.yaml\ntuner: {{lora_rank: 4}}")
    assert lora(load_recipe(top)) == (4, 5, 0.05)


def test_of_several_bases_the_later_wins_and_the_file_over_all(write):
    write("a.yaml", "tuner: {lora_rank: 1, lora_alpha: 1, lora_dropout: 0.1}")
    write("b.yaml", "tuner: {lora_rank: 2, lora_alpha: 2}")
    top = write("top.yaml", "extends: [a.yaml, b.yaml]\ntuner: {lora_rank: 3}")
    assert lora(load_recipe(top)) == (3, 2, 0.1)
    swapped = write("swapped.yaml", "extends: [b.yaml, a.yaml]")
    assert lora(load_recipe(swapped)) == (1, 1, 0.1)


def test_paths_are_relative_to_the_file_that_names_them(write, monkeypatch, tmp_path):
    write("common/base.yaml", "tuner: {lora_rank: 7}")
    write("runs/base.yaml", "tuner: {lora_rank: 8}")
    up = write("runs/up.yaml", "extends: ../common/base.yaml")
    beside = write("runs/beside.yaml", "extends: base.yaml")
    absolute = write("runs/absolute.yaml", f"extends: {tmp_path / 'common' / 'base.yaml'}")
    write("elsewhere/base.yaml", "tuner: {lora_rank: 9}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [load_recipe(path).tuner.lora_rank for path in (up, beside, absolute)] == [7, 8, 7]


def test_bases_may_extend_other_files(write):
    write("a.yaml", "tuner: {lora_rank: 1, lora_alpha: 1, lora_dropout: 0.1}")
    write("deep/b.yaml", "extends: ../a.yaml\ntuner: {lora_alpha: 2, lora_dropout: 0.2}")
    top = write("top.yaml", "extends: deep/b.yaml\ntuner: {lora_dropout: 0.3}")
    assert lora(load_recipe(top)) == (1, 2, 0.3)


def test_a_diamond_is_allowed_and_each_base_counts_as_a_whole(write):
    write("root.yaml", "tuner: {lora_rank: 1, lora_alpha: 1, lora_dropout: 0.1}")
    write("left.yaml", "extends: root.yaml\ntuner: {lora_rank: 2}")
    write("right.yaml", "extends: root.yaml\ntuner: {lora_alpha: 3}")
    top = write("top.yaml", "extends: [left.yaml, right.yaml]")
    assert lora(load_recipe(top)) == (1, 3, 0.1), "right inherits lora_rank 1, and right comes later"


def test_a_circle_is_an_error_that_prints_the_chain(write, tmp_path):
    a = write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: [c.yaml]")
    write("c.yaml", "extends: a.yaml")
    with pytest.raises(RecipeError) as error:
        load_recipe(a)
    chain = " -> ".join(str(tmp_path / f"{name}.yaml") for name in "abca")
    assert str(error.value) == f"{a}: recipes extend each other in a circle: {chain}."


def test_a_file_that_extends_itself_is_a_circle(write):
    path = write("a.yaml", "extends: a.yaml")
    with pytest.raises(RecipeError, match=r"in a circle: \S+a\.yaml -> \S+a\.yaml\.$"):
        load_recipe(path)


def test_mappings_are_merged_key_by_key_and_lists_replaced(write):
    write(
        "base.yaml",
        """
        data: {datasets: {a: {annotation_path: a.json, data_path: x}, b: {annotation_path: b.json}}}
        tuner: {target_modules: [q_proj, k_proj]}
        training: {lr_scheduler_type: cosine_warmup_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 0.5}}
        """,
    )
    top = write(
        "top.yaml",
        """
        extends: base.yaml
        data: {datasets: {a: {data_path: y}}}
        tuner: {target_modules: [v_proj]}
        training: {lr_scheduler_kwargs: {min_lr: 1e-7}}
        """,
    )
    recipe = load_recipe(top)
    assert recipe.data.datasets == {
        "a": {"annotation_path": "a.json", "data_path": "y"},
        "b": {"annotation_path": "b.json"},
    }
    assert recipe.tuner.target_modules == ["v_proj"]
    assert recipe.training.arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-7, "num_cycles": 0.5}


def test_null_unsets_a_mapping_that_a_base_sets(write):
    write("base.yaml", "training: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}}")
    top = write("top.yaml", "extends: base.yaml\ntraining: {lr_scheduler_type: cosine, lr_scheduler_kwargs: null}")
    assert load_recipe(top).training.arguments["lr_scheduler_kwargs"] is None


def test_merging_random_files_equals_omegaconf(write):
    """Compared with OmegaConf.merge, in a mapping that may have any keys."""
    chance = random.Random(0)

    def tree(depth):
        if depth == 0 or chance.random() < 0.3:
            return chance.randrange(100)
        return {f"k{chance.randrange(4)}": tree(depth - 1) for _ in range(3)}

    changed = 0
    for case in range(30):
        trees = [{f"k{i}": tree(3) for i in range(3)} for _ in range(3)]
        names = []
        for number, content in enumerate(trees):
            recipe = OmegaConf.create({"training": {"lr_scheduler_kwargs": content}})
            names.append(write(f"{case}/{number}.yaml", OmegaConf.to_yaml(recipe)).name)
        top = write(f"{case}/top.yaml", f"extends: {names}")
        expected = OmegaConf.to_container(OmegaConf.merge(*trees))
        assert load_recipe(top).training.arguments["lr_scheduler_kwargs"] == expected
        changed += expected != trees[-1]
    assert changed > 20, "vacuous: the last file says everything"


def test_overrides_beat_the_file_and_global_max_length_beats_both_lengths(write):
    path = write("a.yaml", "global_max_length: 20000\ntemplate: {max_length: 4096}\nmodel: {max_model_len: 100}")
    recipe = load_recipe(path)
    assert (recipe.model.max_model_len, recipe.template.max_length) == (20000, 20000)
    recipe = load_recipe(path, ["template.max_length=512", "global_max_length=700"])
    assert (recipe.model.max_model_len, recipe.template.max_length, recipe.global_max_length) == (700, 700, 700)
    assert load_recipe(path, ["global_max_length=null", "template.max_length=50"]).template.max_length == 50


def test_custom_is_data_and_older_names_are_known_in_files(write):
    path = write(
        "a.yaml",
        """
        custom: {train_jsonl: a.jsonl, val_jsonl: b.jsonl}
        tuner: {use_lora: false, tune_mm_vision: true}
        training: {warmup_ratio: 0.25, mm_projector_lr: 1e-5, evaluation_strategy: "no", optimizer: adafactor}
        """,
    )
    recipe = load_recipe(path)
    assert (recipe.data.train, recipe.data.val) == ("a.jsonl", "b.jsonl")
    assert (recipe.tuner.train_type, recipe.tuner.freeze_vit) == ("full", False)
    arguments = recipe.training.arguments
    assert (arguments["warmup_steps"], recipe.training.aligner_lr, arguments["eval_strategy"]) == (0.25, 1e-5, "no")
    assert (arguments["optim"], recipe.training.optimizer) == ("adafactor", "multimodal")


def test_each_value_knows_where_it_came_from(write):
    base = write("base.yaml", "tuner: {lora_rank: 1, lora_alpha: 2}\ntraining: {lr_scheduler_kwargs: {a: 1, b: 2}}")
    top = write("top.yaml", "extends: base.yaml\ntuner: {lora_alpha: 3}\ntraining: {lr_scheduler_kwargs: {b: 3}}")
    recipe = load_recipe(top, ["tuner.lora_dropout=0.1", "template.max_length=77"])
    origins = {key: recipe.origin(key) for key in ("tuner.lora_rank", "tuner.lora_alpha", "tuner.lora_dropout")}
    assert origins == {
        "tuner.lora_rank": str(base),
        "tuner.lora_alpha": str(top),
        "tuner.lora_dropout": "override",
    }
    assert recipe.origin("training.lr_scheduler_kwargs.a") == str(base)
    assert recipe.origin("training.lr_scheduler_kwargs.b") == str(top)
    assert recipe.origin("tuner.use_dora") == "default"
    assert recipe.origins["template.max_length"] == "override"
    whole = load_recipe(top, ['training.lr_scheduler_kwargs={"a": 5}'])
    assert whole.origin("training.lr_scheduler_kwargs.a") == "override"


def test_values_refer_to_other_keys_and_to_the_environment(write, monkeypatch):
    monkeypatch.setenv("MY_DATA", "/data/my.jsonl")
    path = write(
        "a.yaml",
        """
        data: {train: "${oc.env:MY_DATA}"}
        training: {learning_rate: 2e-5, vit_lr: "${training.learning_rate}", run_name: "lr${training.learning_rate}"}
        template: {system_prompt: 'costs \\${5}'}
        """,
    )
    recipe = load_recipe(path)
    assert (recipe.data.train, recipe.training.vit_lr) == ("/data/my.jsonl", 2e-5)
    assert recipe.training.arguments["run_name"] == "lr2e-05"
    assert recipe.template.system_prompt == "costs ${5}"
