#!/usr/bin/env bash
# In transformers' Trainer, gradient accumulation multiplies the balance loss of MoE models.
#
# Expected: A step over 8 sequences is the same with one micro-batch and with eight.
# Observed: The cross-entropy is the same, but the balance loss counts once per micro-batch. The model divides its cross-
# entropy by the number of tokens in the whole step and adds router_aux_loss_coef times the balance loss of the micro-
# batch. Trainer sums what the model returns. With 8 micro-batches the effective coefficient is 8 times the configured
# one, in the logged loss and in the router's gradient. There is no warning.
#
# Seen with torch 2.13.0, transformers 5.24.0, accelerate 1.15.0 (Mixtral, balance loss with coefficient 0.1):
#   1 × 8 sequences: balance loss in the logged loss 0.2013, its part of the router's gradient 0.0302 (×1.00)
#   2 × 4 sequences: balance loss in the logged loss 0.4025, its part of the router's gradient 0.0603 (×2.00)
#   8 × 1 sequences: balance loss in the logged loss 1.6102, its part of the router's gradient 0.2412 (×8.00)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0 accelerate==1.15.0

venv/bin/python -I - <<'END'
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


class Keep(TrainerCallback):
    """The gradient of the first router as the optimizer gets it, and the loss that is logged."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = model.model.layers[0].mlp.gate.weight.grad.clone()

    def on_log(self, args, state, control, logs, **kwargs):
        self.loss = logs.get("loss", getattr(self, "loss", None))


def step(micro_batches: int, coefficient: float) -> Keep:
    """One optimizer step over the same 8 equal sequences, so that every micro-batch has the same balance loss."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir="out", max_steps=1, per_device_train_batch_size=8 // micro_batches, max_grad_norm=0, logging_steps=1,
        gradient_accumulation_steps=micro_batches, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )
    kept = Keep()
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8, callbacks=[kept])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return kept


factors = {}
first = None
for micro_batches in (1, 2, 8):
    with_balance, without = step(micro_batches, 0.1), step(micro_batches, 0.0)
    loss = float(with_balance.loss) - float(without.loss)
    gradient = (with_balance.gradient - without.gradient).norm().item()
    first = first or (loss, gradient)
    factors[micro_batches] = gradient / first[1]
    print(
        f"{micro_batches} × {8 // micro_batches} sequences: balance loss in the logged loss {loss:.4f}, its part of the "
        f"router's gradient {gradient:.4f} (×{factors[micro_batches]:.2f})"
    )
    assert abs(loss / first[0] - micro_batches) < 0.05 * micro_batches, "the logged loss no longer multiplies it"
    assert abs(factors[micro_batches] - micro_batches) < 0.05 * micro_batches, "the gradient no longer multiplies it"
END
