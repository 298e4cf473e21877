"""DeepSpeed with a JSON config: Aurora is the client optimizer, in place of the "optimizer" section.

deepspeed with_deepspeed.py, or torchrun --nproc-per-node 2 with_deepspeed.py

It works at stage 0, where parameters stay whole. The stages 1 to 3 flatten and cut them, and the optimizer refuses to
step them; `aurora train` (engine.kind: deepspeed) runs it there.
"""

import json
import os
from pathlib import Path

import torch
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from aurora_optimizers import Aurora

STEPS = 60
CONFIG = Path(__file__).with_name("ds_config.json")


def main(steps: int = STEPS, config: dict | None = None) -> list[float]:
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(10, 32),
        nn.Flatten(),
        nn.Linear(4 * 32, 256),
        nn.GELU(),
        nn.Linear(256, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    )

    optimizer = Aurora(model, lr=0.02, weight_decay=0.01)
    config = config or json.loads(CONFIG.read_text())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    losses = []
    for step in range(steps * engine.gradient_accumulation_steps()):
        digits = torch.randint(10, (engine.train_micro_batch_size_per_gpu(), 4), device=engine.device)
        loss = nn.functional.cross_entropy(engine(digits), digits[:, 0])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if engine.global_rank == 0 and step % 10 == 0:
            print(f"micro-batch {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
