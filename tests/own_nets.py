"""Backbones that a user might have written, for ``model.arch own_nets:NAME``."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.mlp = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Its own names begin as those of others' checkpoints do; it gives a feature map."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 4, 4), *(Block(width) for _ in range(depth)))
        self.scale = torch.ones(1)  # no buffer: nothing without memory can stand for it

    def forward(self, images):
        return self.backbone(images) * self.scale


def net(width=8, depth=2):
    return Net(width, depth)


class Tokens(Net):
    def forward(self, images):
        return super().forward(images).flatten(2)


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)


class Pair(Net):
    def forward(self, images):
        return (super().forward(images), images) if self.training else super().forward(images)


def number():
    return 3


def broken():
    raise OSError("no weights\nhere")
