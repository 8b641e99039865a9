"""Early stopping whose patience counter survives a resume."""

from typing import Any

from transformers import EarlyStoppingCallback


class PatienceCallback(EarlyStoppingCallback):
    """transformers' early stopping, with its counter restored from a checkpoint.

    transformers restores the state of callbacks only together with the control flags, which tell a run that was
    stopped to stop again.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        """Count only evaluations of the set that ``metric_for_best_model`` names, if there are several sets."""
        if f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **more)  # type: ignore[no-untyped-call]

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_begin(args, state, control, **more)  # type: ignore[no-untyped-call]
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        counter = "early_stopping_patience_counter"
        setattr(self, counter, kept.get("attributes", {}).get(counter, 0))
