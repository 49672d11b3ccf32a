"""The Hugging Face Trainer."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, vocab_size=256)
model = LlamaForCausalLM(config)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (64, 32))]
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), learning_rate=3e-3, weight_decay=0.1, max_steps=10, warmup_steps=2,
    per_device_train_batch_size=4, lr_scheduler_type="cosine", report_to="none", use_cpu=True,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
