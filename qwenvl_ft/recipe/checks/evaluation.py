"""Evaluation, and the choice of the best checkpoint."""

from qwenvl_ft.errors import hint
from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.choices import imported
from qwenvl_ft.recipe.schema import Recipe

METRICS = "qwenvl_ft.evaluation.metrics:METRICS"


def direction_of_metric(recipe: Recipe) -> str | None:
    """Losses are better if lower; metrics of generated answers know their own direction."""
    metric, greater = argument(recipe, "metric_for_best_model"), argument(recipe, "greater_is_better")
    if metric is None or greater is None or bool(greater) == higher_is_better(recipe, metric):
        return None
    return (
        f"training.greater_is_better={str(greater).lower()} would keep the checkpoint with the "
        f"{'highest' if greater else 'lowest'} {metric}, which is the worst. Remove training.greater_is_better."
    )


def higher_is_better(recipe: Recipe, metric: str) -> bool:
    """Return True if a metric of evaluation during training is better if higher."""
    if metric.removeprefix("eval_") != recipe.evaluation.metric:
        return False
    return bool(imported(METRICS)[recipe.evaluation.metric].higher_is_better)


def evaluation_data(recipe: Recipe) -> str | None:
    """Evaluation needs data, and whatever depends on evaluation needs an evaluation schedule."""
    strategy = argument(recipe, "eval_strategy")
    has_data = recipe.data.evaluates
    needs_evaluation = _settings_that_need_evaluation(recipe)
    if argument(recipe, "do_eval") is False and strategy != "no":
        return (
            f"training.do_eval=false, but training.eval_strategy={strategy}. Set eval_strategy=no, or remove do_eval."
        )
    if argument(recipe, "eval_on_start") and not has_data:
        return "training.eval_on_start=true needs an evaluation set. Set data.val."
    if needs_evaluation and not has_data:
        return f"{needs_evaluation[0]} needs an evaluation set. Set data.val."
    if needs_evaluation and strategy == "no":
        return f"{needs_evaluation[0]} needs evaluations. Set training.eval_strategy=steps and training.eval_steps."
    if strategy != "no" and not has_data:
        return f"training.eval_strategy={strategy} needs an evaluation set. Set data.val."
    if recipe.evaluation.run_after_training and not (recipe.evaluation.data or has_data):
        return "evaluation.run_after_training=true needs records to answer. Set evaluation.data or data.val."
    return None


def _settings_that_need_evaluation(recipe: Recipe) -> list[str]:
    settings = {
        "training.save_strategy=best": argument(recipe, "save_strategy") == "best",
        "training.load_best_model_at_end=true": argument(recipe, "load_best_model_at_end"),
        "training.do_eval=true": argument(recipe, "do_eval"),
        "evaluation.run_during_training=true": recipe.evaluation.run_during_training,
        "training.early_stopping_patience": recipe.training.early_stopping_patience is not None,
    }
    return [setting for setting, is_set in settings.items() if is_set]


def metric_for_best_model(recipe: Recipe) -> str | None:
    """Evaluation computes loss and perplexity, both again for each of several sets, and the score of answers."""
    metric = argument(recipe, "metric_for_best_model")
    sets = ["", *(f"{name}_" for name in recipe.data.val)] if isinstance(recipe.data.val, dict) else [""]
    known = [f"eval_{name}{kind}" for name in sets for kind in ("loss", "perplexity")]
    known += [f"eval_{recipe.evaluation.metric}"] if recipe.evaluation.run_during_training else []
    if metric is None or f"eval_{metric.removeprefix('eval_')}" in known:
        return None
    return f"training.metric_for_best_model={metric} is not computed by evaluation.{hint(metric, known)}"


def load_best_model(recipe: Recipe) -> str | None:
    """The best checkpoint can be loaded only if one was saved at that evaluation."""
    evaluate, save = argument(recipe, "eval_strategy"), argument(recipe, "save_strategy")
    if not argument(recipe, "load_best_model_at_end") or save == "best":
        return None
    if save != evaluate:
        return (
            f"training.load_best_model_at_end=true needs a checkpoint at each evaluation, but training.save_strategy="
            f"{save} and training.eval_strategy={evaluate}. Make them equal, or set training.save_strategy=best."
        )
    save_steps, eval_steps = argument(recipe, "save_steps"), argument(recipe, "eval_steps")
    if save == "steps" and save_steps >= 1 and eval_steps >= 1 and save_steps % eval_steps:
        return (
            f"training.load_best_model_at_end=true needs checkpoints at evaluations, but training.save_steps="
            f"{save_steps} is not a multiple of training.eval_steps={eval_steps}. Change one of them."
        )
    return None
