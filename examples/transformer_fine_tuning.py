"""Fine-tune a transformer with transformers' Trainer and the callback of apoptosis.integrations.transformers.

The network is small and its task is made up (which of two words comes more often?), so that the script runs anywhere in
a minute. With a pretrained model only the lines that build `model` and the data change.
"""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from apoptosis.integrations.transformers import ApoptosisTrainerCallback

torch.manual_seed(0)


class Words(Dataset):
    """Sentences of 16 words; the label says whether word 1 comes more often than word 2."""

    def __init__(self, size):
        self.words = torch.randint(1, 8, (size, 16))
        self.labels = ((self.words == 1).sum(1) > (self.words == 2).sum(1)).long()

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def show(record):
    if record["kind"] == "event" and not record["rolled_back"]:
        print("step {}: parameters {:,}->{:,}".format(record["step"], *record["parameters"]))


config = BertConfig(
    vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
arguments = TrainingArguments(
    "runs/example", per_device_train_batch_size=64, num_train_epochs=3, learning_rate=1e-3, logging_strategy="no",
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
)  # fmt: skip
callback = ApoptosisTrainerCallback(log=show)
trainer = Trainer(model, arguments, train_dataset=Words(4000), eval_dataset=Words(500), callbacks=[callback])
before = sum(p.numel() for p in model.parameters())
trainer.train()
print(callback.ledger())
print(trainer.evaluate()["eval_loss"])
print(f"{before:,} -> {sum(p.numel() for p in model.parameters()):,} parameters")
