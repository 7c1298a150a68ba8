"""The bank of CaCo in a training loop of one's own, in plain torch.

    python -m caco_scale.examples.bank_in_your_loop

Under several processes (torchrun) the loop is the same: the bank shares its rows among them, and ``result.loss`` is the
global one. Gradients then come from DDP or FSDP as ever, BatchNorm should be synchronised, and each process brings its
own part of the batch.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import caco_scale
from caco_scale.examples.images import CLASSES, draw_images

STEPS, BATCH, ROWS, DIM = 150, 64, 256, 32


def build_encoder() -> nn.Sequential:
    """Images (B, 3, H, W) to embeddings (B, D)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, DIM))


def view(images: torch.Tensor) -> torch.Tensor:
    """A random view of a batch: shifted, in other colours, with noise."""
    shift = torch.randint(-8, 9, (2,)).tolist()
    scale = 0.5 + torch.rand(len(images), 3, 1, 1)
    return (images * scale).roll(shift, dims=(2, 3)) + 0.1 * torch.randn_like(images)


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = draw_images(1024)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5

    query = build_encoder()
    key = copy.deepcopy(query).requires_grad_(False)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    bank = caco_scale.ShardedBank(size=ROWS, dim=DIM)
    warmup_steps = 2 * ROWS // BATCH  # until then the rows are a queue of keys (the rule of MoCo)
    for step in range(STEPS):
        if step == warmup_steps:  # from here on the bank learns: both start afresh
            key.load_state_dict(query.state_dict())
            bank.reset_velocity()
        rule, temperature = ("moco", 0.2) if step < warmup_steps else ("caco", 0.08)

        batch = images[torch.randint(len(images), (BATCH,))]
        views = [view(batch), view(batch)]
        queries = [F.normalize(query(x)) for x in views]
        with torch.no_grad():
            keys = [F.normalize(key(x)) for x in views]
        result = bank.contrast(queries, keys, temperature, bank_temperature=0.08, rule=rule)

        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()  # 1. the encoder minimises the loss
        bank.step(result, lr=3.0)  # 2. the bank follows the queries
        with torch.no_grad():  # 3. the key encoder follows the query encoder
            for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
                slow.lerp_(fast, 0.01)

        if step % 25 == 0 or step == STEPS - 1:
            print(
                f"step {step:3}: {rule}, loss {result.loss:.3f}, p(positive) {result.positive_probability:.3f}"
            )

    with torch.no_grad():
        features = F.normalize(query.eval()(images))
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(dim=1)
    right = (torch.from_numpy(labels)[nearest] == torch.from_numpy(labels)).float().mean()
    print(
        f"the nearest neighbour has the same class for {right:.0%} of the images (chance: {1 / CLASSES:.0%})"
    )


if __name__ == "__main__":
    main()
