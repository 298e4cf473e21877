"""Lightning: one line in `configure_optimizers`. The module itself is the model, so layers have to exist by then."""

from pathlib import Path

import lightning
import torch
from aurora_optimizers import Aurora
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, CONTEXT = 60, 8


class NextByte(lightning.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Embedding(256, width),
            nn.Flatten(),
            nn.Linear(CONTEXT * width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width),
            nn.Linear(width, 256),
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        window, target = batch
        loss = nn.functional.cross_entropy(self.model(window), target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = Aurora(self, lr=0.02, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(steps: int = STEPS) -> list[float]:
    lightning.seed_everything(0)
    data = torch.tensor(list(Path(__file__).read_bytes()))
    windows = data.unfold(0, CONTEXT + 1, 1)
    loader = DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), batch_size=32, shuffle=True)
    model = NextByte()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader)
    return model.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
