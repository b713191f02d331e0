"""A training loop with mixed precision, a gradient scaler, gradient accumulation and clipping."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lc_compress import LC, Binary, geometric


def main() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(96, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    lc = LC(model, {"*.weight": Binary()}, schedule=geometric(0.1, 1.5, 6), optimizer=optimizer)

    for _ in lc.steps():
        for i, (x, y) in enumerate(loader, start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss / 2).backward()
            if i % 2 == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    lc.finalize()
    return model


if __name__ == "__main__":
    main()
