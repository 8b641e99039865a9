"""``data.check_dataset_strategy`` runs the check before training, on one rank for all."""

import pytest
from look_cases import asked

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.training.data_gate import check_before_training


@pytest.mark.parametrize("strategy", ["none", "warning", "error"])
def test_the_strategy_decides_whether_training_begins(strategy, data, tiny_dir, capsys):
    path = data([asked("a.png"), asked("gone.png")])
    recipe = target_recipe([str(path), "--model", str(tiny_dir), "--check_dataset_strategy", strategy])
    if strategy == "error":
        with pytest.raises(DataError, match=r"1 fault in 2 records \(1 missing\).*data.jsonl:2"):
            check_before_training(recipe)
    else:
        check_before_training(recipe)
    assert ("gone.png" in capsys.readouterr().out) == (strategy != "none")


def test_training_checks_the_data_before_it_writes(data, tiny_dir, tmp_path, capsys):
    path = data([asked("a.png"), asked("half.png")])
    words = [f"data.train={path}", f"model.model={tiny_dir}", f"training.output_dir={tmp_path / 'out'}"]
    assert main(["train", *words, "--check_dataset_strategy", "error"]) == 2
    assert "1 corrupt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def check_on_a_rank(rank, path, tiny_dir, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    recipe = target_recipe([str(path), "--model", str(tiny_dir), "--check_dataset_strategy", "error"])
    try:
        check_before_training(recipe)
    except DataError as error:
        (folder / f"rank{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_every_rank_gets_the_verdict_of_the_rank_that_checked(data, tiny_dir, tmp_path, capfd):
    import torch.multiprocessing as mp

    path = data([asked("a.png"), asked("gone.png")])
    mp.start_processes(check_on_a_rank, (path, tiny_dir, tmp_path), nprocs=2, start_method="fork")
    errors = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "1 missing" in errors[0]
    assert capfd.readouterr().out.count("gone.png does not exist") == 1
