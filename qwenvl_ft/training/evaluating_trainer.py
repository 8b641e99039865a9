"""Trainer whose evaluation loss is the mean over all supervised tokens, and that answers questions by generation."""

from collections.abc import Sized
from typing import Any, cast

from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.bad_samples import count_bad_samples
from qwenvl_ft.training.eval_loss import evaluate_sum, joint_metrics, loss_metrics
from qwenvl_ft.training.ranks import sum_over_ranks
from qwenvl_ft.training.step_log import StepLog
from qwenvl_ft.training.stopping_trainer import StoppingTrainer


class EvaluatingTrainer(StoppingTrainer):
    """Adds the evaluation to `StoppingTrainer`; `QwenVLTrainer` adds the rest."""

    questions: Questions | None
    """Answered by generation at each evaluation; None asks nothing."""
    step_log: StepLog

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as transformers does; with several sets ``eval_loss`` is the mean over the tokens of all.

        The questions are answered when the trainer's own sets are evaluated.
        """
        own = eval_dataset is None
        self.evaluating = self.evaluating or own
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if own else eval_dataset
        more = joint_metrics(metrics, sets, metric_key_prefix) if isinstance(sets, dict) else {}
        if own and self.questions is not None:
            with self.step_log.meter.paused():
                more |= self.questions.ask(self, f"{metric_key_prefix}_")[0]
        if more:
            self.log(more)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, more)
        self.evaluating = self.evaluating and not own
        return metrics | more

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean loss over a set's supervised tokens, its perplexity, and no predictions."""
        with self.step_log.meter.paused():
            model = self._evaluation_model()
            self.use_evaluation_weights()
            forward = self.compute_loss_context_manager
            batches = (self.agreed(batch, dataloader.dataset) for batch in self.guarded(dataloader))
            total, bad = evaluate_sum(model, batches, self.args.device, forward, self.sequence)
            loss, tokens = sum_over_ranks(total, self.accelerator).tolist()
            metrics = loss_metrics(loss, tokens, metric_key_prefix)
            count = len(cast(Sized, dataloader.dataset))
            if bad := count_bad_samples(bad, dataloader.dataset, count, self.accelerator):
                metrics[f"{metric_key_prefix}_bad_samples"] = bad
            return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=count)

    def use_evaluation_weights(self) -> None:
        """Switch schedule-free optimizers to the weights to evaluate and save; the next step switches them back."""
        if self.optimizer is not None and callable(getattr(self.optimizer, "eval", None)):
            cast(Any, self.optimizer).eval()

    def _evaluation_model(self) -> nn.Module:
        """Return the model as training wraps it; without training, prepared for evaluation."""
        if not self.is_prepared:
            self.is_prepared = True
            return cast(nn.Module, self.accelerator.prepare_model(cast(nn.Module, self.model), evaluation_mode=True))
        return cast(nn.Module, self.model)
