"""transformers' warnings about modules that GaLore leaves out are one line; all its other lines stay."""

import logging

import pytest
from cases import quiet_arguments
from transformers import Trainer

from qwenvl_ft.upstream.projected_modules import LOGGER, MARK, one_line_for_ignored_modules

OURS = "qwenvl_ft.upstream.projected_modules"


@pytest.fixture
def lines(caplog):
    """Return the logged lines so far by logger."""
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.WARNING, logger=LOGGER)  # other tests may have made transformers silent
    source = logging.getLogger(LOGGER)
    source.addHandler(caplog.handler)  # transformers' loggers do not propagate
    yield lambda name: [record.getMessage() for record in caplog.records if record.name == name]
    source.removeHandler(caplog.handler)


def optimizer_of(model, folder):
    pytest.importorskip("galore_torch")
    args = quiet_arguments(folder, optim="galore_adamw", optim_target_modules=["mlp", "self_attn"])
    return Trainer.get_optimizer_cls_and_kwargs(args, model)


def test_the_lines_about_single_modules_become_one(tiny_model, tmp_path, lines):
    optimizer_of(tiny_model, tmp_path)
    single = {line for line in lines(LOGGER) if MARK in line}
    assert len(single) > 10, "vacuous: the installed transformers says nothing"
    count = len(lines(LOGGER))
    with one_line_for_ignored_modules():
        optimizer_of(tiny_model, tmp_path)
        logging.getLogger(LOGGER).warning("another line")
    assert set(lines(LOGGER)[count:]) == {"another line"}
    (line,) = lines(OURS)
    assert line.startswith(f"{len(single)} modules")


def test_without_such_lines_nothing_is_said(lines):
    with one_line_for_ignored_modules():
        logging.getLogger(LOGGER).warning("another line")
    assert lines(OURS) == []
