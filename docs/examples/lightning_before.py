"""PyTorch Lightning."""

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Language(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, vocab_size=256)
        self.model = LlamaForCausalLM(config)

    def training_step(self, ids):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)


data = torch.utils.data.DataLoader(torch.randint(256, (64, 32)), batch_size=4)
module = Language()
trainer = lightning.Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, data)
