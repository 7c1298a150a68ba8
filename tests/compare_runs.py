"""Command: ``python tests/compare_runs.py RUN_A RUN_B``: do two runs agree to the last bit?

A refactor must not move the mathematics. Train the same short recipe in float64 with the code before and the code after
(CONTRIBUTING.md has the command), then compare: every loss of ``metrics.jsonl`` and every tensor of the newest
checkpoint. Exit code 1 names what differs, and by how much.
"""

import sys
from pathlib import Path

import torch
from launch import final_state, relative_difference

from caco_scale.run.directory import read_json_lines


def logged_losses(run):
    return {
        line["step"]: line["loss"] for line in read_json_lines(Path(run, "metrics.jsonl")) if "loss" in line
    }


def differences(run_a, run_b):
    """What differs, a line each; empty where nothing does."""
    lines = []
    losses_a, losses_b = logged_losses(run_a), logged_losses(run_b)
    if losses_a != losses_b:
        steps = sorted(s for s in losses_a.keys() | losses_b.keys() if losses_a.get(s) != losses_b.get(s))
        step = steps[0]
        lines.append(
            f"losses of {len(steps)} step(s) differ, first step {step}: {losses_a.get(step)} {losses_b.get(step)}"
        )
    (state_a, values_a), (state_b, values_b) = final_state(run_a), final_state(run_b)
    if values_a["step"] != values_b["step"]:
        lines.append(f"the newest checkpoints are of steps {values_a['step']} and {values_b['step']}")
    if state_a.keys() != state_b.keys():
        return [*lines, f"tensors in one only: {', '.join(sorted(state_a.keys() ^ state_b.keys()))}"]
    unequal = [name for name in state_a if not torch.equal(state_a[name], state_b[name])]
    if unequal:
        worst, name = relative_difference(state_a, state_b)
        lines.append(f"{len(unequal)} of {len(state_a)} tensors differ, most {name}: {worst:.1e} relative")
    return lines


if __name__ == "__main__":
    found = differences(*sys.argv[1:])
    print("\n".join(found) or "equal to the last bit")
    sys.exit(bool(found))
