"""Accelerate, after its nlp_example.py: a classifier of sentence pairs, its optimizer prepared with the model.

The pairs are made up: is the second the first in reverse? `accelerate launch with_accelerate.py` runs it on several
processes with DistributedDataParallel.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from aurora_optimizers import Aurora, Settings
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

STEPS, PAIRS, LENGTH, SEPARATOR = 60, 512, 4, 9


def get_dataloaders(batch: int = 32) -> tuple[DataLoader, DataLoader]:
    first = torch.randint(SEPARATOR, (PAIRS, LENGTH))
    labels = torch.randint(2, (PAIRS,))
    second = torch.where(labels[:, None] == 1, first.flip(1), torch.randint(SEPARATOR, (PAIRS, LENGTH)))
    tokens = torch.cat([first, torch.full((PAIRS, 1), SEPARATOR), second], dim=1)
    split = PAIRS * 3 // 4
    train, test = (TensorDataset(tokens[part], labels[part]) for part in (slice(split), slice(split, None)))
    return DataLoader(train, batch, shuffle=True), DataLoader(test, batch)


def main(steps: int = STEPS) -> list[float]:
    accelerator = Accelerator()
    set_seed(0)
    train, test = get_dataloaders()
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=SEPARATOR + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            num_labels=2,
        )
    )

    # The last layer of a model may be anything: without the override a warning says that it goes to AdamW.
    routing = Settings(overrides={"^classifier": "adamw"})
    optimizer = Aurora(model, lr=0.01, weight_decay=0.01, routing=routing)
    accelerator.print(optimizer.table)

    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, train, test, schedule = accelerator.prepare(model, optimizer, train, test, schedule)

    losses: list[float] = []
    while len(losses) < steps:
        model.train()
        for tokens, labels in train:
            loss = model(tokens, labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
        model.eval()
        right = []
        for tokens, labels in test:
            with torch.no_grad():
                guess = model(tokens).logits.argmax(dim=-1)
            right.append(accelerator.gather_for_metrics((guess == labels).float()))
        accelerator.print(f"after {len(losses)} steps: loss {losses[-1]:.3f}, accuracy {torch.cat(right).mean():.3f}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
