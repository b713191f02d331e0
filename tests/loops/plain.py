"""A plain training loop."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(96, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    for _ in range(6):
        for x, y in loader:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()

    return net


if __name__ == "__main__":
    main()
