"""No command imports optional packages that it does not use, which would cost seconds and print warnings."""

import json
import subprocess
import sys

import pytest

UNASKED = ("bitsandbytes", "deepspeed", "wandb", "galore_torch", "apollo_torch", "schedulefree", "liger_kernel")
PROGRAM = """
import json, sys
from qwenvl_ft.cli.main import main
found = {}
for words in json.loads(sys.argv[1]):
    code = main(words)
    found[words[0]] = [code, sorted({name.partition('.')[0] for name, module in sys.modules.items() if module})]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("imports") / "d.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    file.write_text("".join(json.dumps({"conversations": turns, "id": str(k)}) + "\n" for k in range(3)))
    return file


def test_no_command_imports_what_it_does_not_use(tiny_dir, data, tmp_path):
    """All run in one process, the light ones first, so that an import is attributed to the command that adds it."""
    model = f"model.model={tiny_dir}"
    commands = [
        ["--help"],
        ["infer", "--model", str(tiny_dir), "--prompt", "What?", "--max-new-tokens", "2"],
        ["tiny", str(tmp_path / "tiny")],
        ["recipe", "lora_4b"],
        ["inspect", str(tiny_dir)],
        ["check", str(data), model],
        ["show", str(data), model, "--out", str(tmp_path / "page.html")],
        ["stats", str(data), model],
        [
            *("train", model, f"data.train={data}", "tuner.train_type=lora", "training.max_steps=1"),
            *(f"training.output_dir={tmp_path / 'run'}", "model.torch_dtype=float32"),
        ],
    ]
    words = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (code, modules) in found.items():
        assert code == 0, (name, done.stderr)
        assert not set(UNASKED) & set(modules), name
    assert "gemm_4bit" not in done.stderr
    assert "torch" not in found["--help"][1]
    assert "peft" not in found["tiny"][1]
    assert {"torch", "peft", "accelerate"} <= set(found["train"][1]), "vacuous: nothing was trained"
