"""A nanoGPT-style loop: `Aurora(model)` takes the place of `model.configure_optimizers(...)`.

python nanogpt.py trains a small GPT on the bytes of this file.
"""

import math
from pathlib import Path

import torch
from aurora_optimizers import Aurora
from torch import Tensor, nn
from torch.nn import functional

STEPS, WARMUP, BATCH, CONTEXT = 100, 5, 8, 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.attn_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, vocabulary: int = 256) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return functional.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def factor(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a tenth: what every learning rate is multiplied by."""
    if step < WARMUP:
        return (step + 1) / (WARMUP + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def main(steps: int = STEPS) -> list[float]:
    torch.manual_seed(0)
    data = torch.tensor(list(Path(__file__).read_bytes()))
    model = GPT()

    optimizer = Aurora(model, lr=0.02, weight_decay=0.01)
    print(optimizer.table)

    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:  # the matrices and AdamW's parameters have rates of their own
            group["lr"] = group["base_lr"] * factor(step, steps)
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
        window = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
