"""Hugging Face's Trainer: three lines, marked below. The factory gets the model, and with it the modules.

`optimizer_cls_and_kwargs` takes an optimizer class or anything else that, when called, returns a function of the model.
Do not pass the class itself, (Aurora, {...}): the Trainer gives it bare parameters, of which only shapes are known.
"""

import tempfile
from pathlib import Path

import torch
from aurora_optimizers import Aurora  # 1
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS, CONTEXT = 60, 32


def main(steps: int = STEPS) -> list[float]:
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        options = {"lr": 0.02, "weight_decay": 0.01}  # 2; the Trainer's own learning_rate and weight_decay are not used
        factory = (lambda: Aurora, options)
        trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=factory)  # 3
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
