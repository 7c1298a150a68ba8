"""Before a run: checks of machine, launch, configuration and data; memory, cost and the preflight of a job's nodes."""
