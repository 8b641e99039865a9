"""`upstream/peft.py` and `upstream/adalora_ranks.py` with the installed peft, and with made-up releases that differ."""

import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig
from qwenvl_ft.upstream import adalora_ranks as ranks
from qwenvl_ft.upstream import peft as borrowed
from qwenvl_ft.upstream.peft import BaseTunerLayer, WrappingTuner


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class Doubling(nn.Module, BaseTunerLayer):
    """Wraps a layer and doubles its output."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.merged_adapters = []
        self.doubling_weight = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x):
        return self.base_layer(x) * self.doubling_weight


class DoublingTuner(WrappingTuner):
    prefix = "doubling_"
    tuner_layer_cls = Doubling

    def wrapped(self, module, adapter_name, config):
        return Doubling(module)


def config(**more):
    return BottleneckConfig(target_modules=["1"], **more)


def test_peft_asks_a_tuner_for_each_target_and_runs_what_it_gives():
    model, x = two_layers(), torch.randn(3, 4)
    expected = model(x)
    tuner = DoublingTuner(model, config(), "default")
    assert isinstance(model[1], Doubling)
    assert not isinstance(model[0], Doubling)
    torch.testing.assert_close(tuner(x), expected * 2)


def test_a_tuner_runs_the_hooks_of_the_model_that_it_wraps():
    model, seen = two_layers(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(1))
    DoublingTuner(model, config(), "default")(torch.randn(3, 4))
    assert seen == [1]


def test_types_of_our_own_are_saved_and_loaded(tmp_path):
    register_adapters()
    model = peft.get_peft_model(two_layers(), config(length=2))
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) * value.requires_grad
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(two_layers(), str(tmp_path))
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(x), model(x))
    assert not torch.allclose(model(x), two_layers()(x))
    assert borrowed.unmatched(again, str(tmp_path), "default") == ([], [])
    assert borrowed.prefix_of(config().peft_type) == "bottleneck_"


@pytest.mark.parametrize("name", ["lora", "vera", "ia3", "loha", "boft", "vblora", "shira", "adalora"])
def test_the_weights_that_peft_saves_are_those_that_are_expected(tmp_path, name):
    """In files that peft itself writes, no weight is missing or unexpected; a removed one is named."""
    from safetensors.torch import load_file, save_file

    more = {"ia3": {"feedforward_modules": []}, "vblora": {"vector_length": 2, "num_vectors": 4}}.get(name, {})
    more |= {"adalora": {"total_step": 10}, "shira": {"r": 1}}.get(name, {})
    config = borrowed.config_class_of(name.upper(), "key")(target_modules=["1"], modules_to_save=["0"], **more)
    peft.get_peft_model(two_layers(), config).save_pretrained(tmp_path)
    again = borrowed.load_onto(two_layers(), str(tmp_path), "default")
    assert borrowed.unmatched(again, str(tmp_path), "default") == ([], [])
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    gone = next(iter(state))
    save_file({key: value for key, value in state.items() if key != gone} | {"x.lora_A.weight": torch.ones(1)}, path)
    missing, strange = borrowed.unmatched(again, str(tmp_path), "default")
    assert [gone.removesuffix(".weight") in key for key in missing] == [True]
    assert strange == ["x.lora_A.weight"]


def test_what_an_older_peft_lacks_is_one_line_with_the_release_to_install(monkeypatch):
    table = {
        kind: value for kind, value in borrowed._table("CONFIG").items() if getattr(kind, "value", kind) != "PSOFT"
    }
    monkeypatch.setattr(borrowed, "_table", lambda what: table)
    assert borrowed.config_class_of("LORA", "tuner.train_type=lora") is peft.LoraConfig
    with pytest.raises(RecipeError, match=r"tuner.train_type=psoft is not in peft .*pip install 'peft>=0.19.0'"):
        borrowed.config_class_of("PSOFT", "tuner.train_type=psoft")
    monkeypatch.delattr(peft, "LoraGAConfig", raising=False)
    with pytest.raises(RecipeError, match=r"init_weights=lora-ga is not in peft .*pip install 'peft>=0.19.0'"):
        borrowed.public("LoraGAConfig", "tuner.init_weights=lora-ga", "lora-ga")


def test_a_release_without_its_tables_is_one_line(monkeypatch):
    for place in (sys.modules["peft.mapping"], peft):
        monkeypatch.delattr(place, "PEFT_TYPE_TO_PREFIX_MAPPING", raising=False)
    with pytest.raises(RecipeError, match="has no table PEFT_TYPE_TO_PREFIX_MAPPING"):
        borrowed.prefix_of("LORA")


def test_a_release_that_asks_tuners_otherwise_is_one_line(monkeypatch):
    monkeypatch.delattr(borrowed.BaseTuner, "_create_and_replace")
    with pytest.raises(
        RecipeError, match=r"adapter of type BOTTLENECK: .* peft .* has no BaseTuner\._create_and_replace"
    ):
        register_adapters()


def test_ranks_are_counted_over_what_trains():
    config = peft.AdaLoraConfig(target_modules=["0", "1"], init_r=4, target_r=1, total_step=10, tinit=1, tfinal=1)
    model = peft.get_peft_model(two_layers(), config)
    ranks.count_trained_ranks(model)
    allocator = model.base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (8, 2)
    allocator.ipt["kept"] = torch.ones(1)
    for name, value in model.named_parameters():
        value.requires_grad_("model.1." in name and "lora_" in name)
    ranks.count_trained_ranks(model)
    again = model.base_model.rankallocator
    assert (again.init_bgt, again.target_bgt) == (4, 1)
    assert again.ipt == allocator.ipt, "what it remembers is kept"


def test_a_release_with_another_allocator_refuses_adalora_in_one_line(monkeypatch):
    from peft.tuners import adalora

    class Renamed:
        def __init__(self, module, settings): ...

    assert ranks.RANKS.missing() == ""
    monkeypatch.setattr(adalora, "RankAllocator", Renamed)
    with pytest.raises(RecipeError, match=r"train_type=adalora: .* peft .*has no Renamed.update_and_allocate"):
        ranks.count_trained_ranks(None)

    class Needing(adalora.AdaLoraModel):
        def __init__(self, model, peft_config, adapter_name, schedule): ...

        mask_using_rank_pattern = reset_ipt = None

    monkeypatch.setattr(adalora, "RankAllocator", Needing)
    assert "needs 'schedule'" in ranks.RANKS.missing()


def test_lora_is_wrapped_without_bitsandbytes():
    """A stand-in for the package reports its import; peft's cached answer is cleared afterwards."""
    script = """
        import sys, types, importlib.abc, importlib.machinery
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path=None, target=None):
                if name == "bitsandbytes":
                    return importlib.machinery.ModuleSpec(name, self)
            def create_module(self, spec):
                print("imported", file=sys.stderr)
                module = types.ModuleType(spec.name)
                module.nn = types.SimpleNamespace(Linear4bit=type("A", (), {}), Linear8bitLt=type("B", (), {}))
                return module
            def exec_module(self, module): ...
        sys.meta_path.insert(0, Finder())
        import qwenvl_ft.upstream.peft as borrowed
        import peft, torch
        with borrowed.without_bitsandbytes():
            peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
        assert "bitsandbytes" not in sys.modules
        from peft.import_utils import is_bnb_available
        assert is_bnb_available(), "hidden for good"
        print("PLAIN" if not sys.argv[1:] else "")
        if sys.argv[1:]:
            import bitsandbytes
            with borrowed.without_bitsandbytes():
                assert is_bnb_available(), "in use, so not hidden"
    """
    for more in ([], ["used"]):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("imported") == len(more), done.stderr[-2000:]
