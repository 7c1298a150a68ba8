"""The training loop, its one step, and what builds the parts of a run from its configuration."""
