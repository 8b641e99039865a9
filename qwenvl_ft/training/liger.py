"""Puts Liger's kernels into a model, and into the loss where they compute the same."""

from torch import nn
from transformers import TrainingArguments

from qwenvl_ft.model.liger_kernels import LOSS, Fused, use_liger
from qwenvl_ft.training.loss import use_fused_loss


def use_liger_kernels(model: nn.Module, args: TrainingArguments, *, weighted: bool) -> Fused:
    """Use Liger's kernels in a model's layers, and for the loss unless a setting or the head rules that out.

    Args:
        weighted: True if tokens have loss weights of their own, which Liger's loss does not support.

    Returns:
        The kernels in use, and why others are not.
    """
    fused = use_liger(model, args.device, args.liger_kernel_config)
    if fused.loss is not None:
        reason = "loss_weights give tokens weights of their own" if weighted else ""
        if args.fp16:
            reason = "autograd scales float16 gradients before they could vanish"
        if reason := reason or use_fused_loss(model, fused.loss):
            fused.loss, fused.left[LOSS] = None, reason
    return fused
