"""One step of the rules beside caco, adco and moco, as their formulae are written: dense, float64, one process, nothing
from the package.

Shapes as in oracle.py. ``groups``: index tensors that part the batch into what is contrasted together (micro-batches).
"""

import torch
import torch.nn.functional as F
from oracle import Step, enqueue, pair_list

RULES = ("nearest", "nnclr", "inbatch")


def kin_step(
    queries,
    keys,
    rows,
    velocity,
    temperature=0.08,
    bank_temperature=0.08,
    rule="nnclr",
    lr=3.0,
    pointer=0,
    groups=None,
):
    """One step: loss, its gradient, positives, and the rows after it; they learn in none of these rules."""
    queries = [q.detach().double().requires_grad_() for q in queries]
    keys, rows = [k.detach().double() for k in keys], rows.double()
    groups = [torch.arange(len(keys[0]))] if groups is None else groups
    unit = rows / rows.norm(dim=1, keepdim=True)
    positives = None if rule == "inbatch" else [(k @ unit.T).argmax(1) for k in keys]
    loss, probabilities = 0.0, []
    for i, j, weight in pair_list(len(queries)):
        for group in groups:
            q, k = queries[i][group], keys[j][group]
            logits, target = {
                "nearest": lambda: (q @ unit.T, positives[j][group]),  # noqa: B023
                "nnclr": lambda: (unit[positives[j][group]] @ q.T, torch.arange(len(q))),  # noqa: B023
                "inbatch": lambda: (q @ k.T, torch.arange(len(q))),  # noqa: B023
            }[rule]()
            loss = loss + weight * F.cross_entropy(logits / temperature, target) / len(groups)
            probabilities.append(torch.softmax(logits / temperature, 1)[torch.arange(len(q)), target])
    dq = torch.autograd.grad(loss, queries)
    rows = rows if rule == "inbatch" else enqueue(rows, keys, pointer)
    return Step(
        loss.detach(),
        list(dq),
        positives,
        torch.cat(probabilities).mean().item(),
        None,
        rows,
        velocity.double(),
    )
