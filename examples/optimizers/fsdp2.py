"""A torchtitan-style loop over `fully_shard` (FSDP2): built on the meta device, sharded, initialised, optimizer last.

torchrun --nproc-per-node 2 fsdp2.py

The optimizer is made after fully_shard, which replaces the parameters by DTensors. Each matrix is put together on one
process, which finds its direction.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from aurora_optimizers import Aurora
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

STEPS, BATCH, CONTEXT = 60, 4, 64


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.n_heads = dim // n_heads, n_heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, 3 * dim, bias=False)
        self.w2 = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(functional.silu(self.w1(h)) * self.w3(h))


class Transformer(nn.Module):
    def __init__(self, dim: int = 64, n_layers: int = 2, n_heads: int = 4, n_kv_heads: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(TransformerBlock(dim, n_heads, n_kv_heads) for _ in range(n_layers))
        self.norm, self.output = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def main(steps: int = STEPS) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))

    with torch.device("meta"):
        model = Transformer()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()

    optimizer = Aurora(model, lr=0.02, weight_decay=0.01)
    if rank == 0:
        print(optimizer.table)

    data = torch.tensor(list(Path(__file__).read_bytes()), device=device)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        window = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        loss = functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / dist.get_world_size())
        losses.append(loss.item())
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
