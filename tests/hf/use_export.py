"""Uses an export without this project: generates, fine-tunes for one epoch, counts experts.

use_export.py OUT TUNED prints the loss before and after, and experts per token.
"""

import json
import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

path, tuned = sys.argv[-2:]
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
texts = [f"the number {n} comes before {n + 1}" for n in range(64)]
data = [tokenizer(text) for text in texts]
arguments = TrainingArguments(
    tuned, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=3e-2, report_to=[], use_cpu=True,
    gradient_checkpointing=True, logging_steps=1000, save_strategy="no", disable_tqdm=True,
)  # fmt: skip
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:16], data_collator=collator)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model(tuned)
model = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True).eval()
batch = tokenizer(["the number", "the"], return_tensors="pt", padding=True)
assert model.generate(**batch, max_new_tokens=5).shape[0] == 2
experts = model(**batch, output_router_logits=True).experts_per_token.float().mean().item()
print(json.dumps([before, after, experts]))
