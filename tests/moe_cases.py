"""Helpers of the tests of MoE models under several engines."""

from qwenvl_ft.tuning.prepare import trainable_table

RATES = {"vision": 1.0, "merger": 1.0, "llm": 1.0}


def facts_of(model):
    """Return what a prepared model shows of its parameters: the table, and the names that train."""
    return trainable_table(model, RATES), [name for name, value in model.named_parameters() if value.requires_grad]
