"""One step of the bank as the formulae are written: dense, float64, one process, nothing from the package.

Shapes: N global batch, V views, K rows, D embedding. Queries: list of (N, D), the two global views first; keys: list
of two (N, D); rows and velocity (K, D).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Step:
    loss: torch.Tensor
    dq: list  # per view (N, D)
    positives: list | None  # per key view (N,)
    positive_probability: float
    bank_gradient: torch.Tensor | None  # (K, D)
    rows: torch.Tensor  # after the step
    velocity: torch.Tensor


def pair_list(num_views):
    """(query view, key view, weight) of every pair: two views are summed, more are averaged group by group."""
    pairs = [(i, j) for i in range(num_views) for j in (0, 1) if i != j]
    if num_views == 2:
        return [(i, j, 1.0) for i, j in pairs]
    num_global = sum(i < 2 for i, _ in pairs)
    return [(i, j, 1 / (num_global if i < 2 else len(pairs) - num_global)) for i, j in pairs]


def oracle_step(
    queries,
    keys,
    rows,
    velocity,
    temperature=0.08,
    bank_temperature=0.08,
    rule="caco",
    lr=3.0,
    momentum=0.9,
    pointer=0,
    bank_gradient_by="formula",
):
    """One step: loss, its gradient, positives, and the bank after it."""
    queries = [q.detach().double().requires_grad_() for q in queries]
    keys = [k.detach().double() for k in keys]
    rows, velocity = rows.double(), velocity.double()
    norm = rows.norm(dim=1, keepdim=True)
    unit = rows / norm
    positives = [(k @ unit.T).argmax(1) for k in keys] if rule == "caco" else None
    gradient_of = {"formula": _bank_gradient, "autograd": _bank_gradient_by_autograd}[bank_gradient_by]

    loss, gradient, probabilities = 0.0, torch.zeros_like(rows), []
    for i, j, weight in pair_list(len(queries)):
        q, s = queries[i], queries[i] @ unit.T
        if rule == "caco":
            logits, target = s, positives[j]
        else:
            logits = torch.cat([(q * keys[j]).sum(1, keepdim=True), s], dim=1)
            target = torch.zeros(len(q), dtype=torch.long)
        loss = loss + weight * F.cross_entropy(logits / temperature, target)
        probabilities.append(torch.softmax(logits / temperature, 1)[torch.arange(len(q)), target])
        w = torch.softmax(logits.detach() / bank_temperature, 1)
        w = (w - F.one_hot(target, logits.shape[1])).abs()
        w = w if rule == "caco" else w[:, 1:]
        gradient += weight * gradient_of(w, q.detach(), rows, bank_temperature)

    dq = torch.autograd.grad(loss, queries)
    if rule == "moco":
        gradient = None
        rows = enqueue(rows, keys, pointer)
    else:
        velocity = momentum * velocity + gradient
        rows = rows - lr * velocity
    probability = torch.cat(probabilities).mean().item()
    return Step(loss.detach(), list(dq), positives, probability, gradient, rows, velocity)


def _bank_gradient(w, q, rows, bank_temperature):
    """−[wᵀ q / N − mean_n(w ∘ s) ∘ U] / (T_bank ‖W‖)"""
    norm = rows.norm(dim=1, keepdim=True)
    s = q @ (rows / norm).T
    mean = (w * s).mean(0)[:, None]
    return -(w.T @ q / len(q) - mean * rows / norm) / (bank_temperature * norm)


def _bank_gradient_by_autograd(w, q, rows, bank_temperature):
    """The gradient of −(w ∘ s).sum() / (N T_bank) with w constant."""
    rows = rows.clone().requires_grad_()
    objective = -(w * (q @ F.normalize(rows).T)).sum() / (len(q) * bank_temperature)
    return torch.autograd.grad(objective, rows)[0]


def enqueue(rows, keys, pointer):
    """The 2N keys one by one over the next rows, modulo K: the last writer wins."""
    rows = rows.clone()
    for offset, key in enumerate(torch.cat(keys)):
        rows[(pointer + offset) % len(rows)] = key
    return rows


def random_inputs(num_samples, num_rows, dim, num_views=2, seed=0):
    """Queries, keys, rows and velocity; keys near some rows, queries near keys, so that no softmax is flat."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = randn(num_rows, dim) * (0.5 + torch.rand(num_rows, 1, dtype=torch.float64, generator=generator))
    chosen = torch.randint(num_rows, (num_samples,), generator=generator)
    keys = [F.normalize(F.normalize(rows)[chosen] + 0.25 * randn(num_samples, dim)) for _ in range(2)]
    queries = [F.normalize(keys[i % 2] + 0.25 * randn(num_samples, dim)) for i in range(num_views)]
    return queries, keys, rows, 0.01 * randn(num_rows, dim)
