"""A training loop around torch.compile, with a learning-rate schedule."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> nn.Module:
    torch.manual_seed(0)
    model = torch.compile(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), backend="eager"
    )
    x = torch.randn(96, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    for _ in range(6):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()

    return model


if __name__ == "__main__":
    main()
