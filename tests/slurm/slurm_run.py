"""A run of the real trainer as jobs of a test cluster: submit it, disturb it, read what it left."""

import json
import sys
import time
from pathlib import Path

import yaml
from launch import ROOT, SMALL, planned_keys

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.run.audit import incomplete_steps, read_audit
from caco_scale.run.files import read_json_lines

PATIENCE_SECONDS = 900  # machines are busy; nothing here depends on how quick one is
DIVERGES = {"optim.lr": 1e9, "optim.weight_decay": 1e6}  # the largest rate there is; fp64 ends in 16 steps
SMALL_JOB = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=100")


class SlurmRun:
    """``home`` holds its site file, recipe, logs and run directory; ``end_at`` is where training is to end."""

    def __init__(self, cluster, name, shards, strategy="ddp", site="", **flags):
        self.cluster, self.name, self.strategy = cluster, name, strategy
        self.home = cluster.folder / "work" / name
        self.home.mkdir(parents=True)
        self.path = self.home / "runs" / name
        self.jobs, self.shards = [], shards
        self.flags = {**SMALL, "optim.epochs": 5000, "run.max_steps": 0, "data.workers": 0}
        self.flags |= {"data.shards": shards, "data.audit": str(self.home / "audit.jsonl")}
        self.flags |= {} if strategy == "ddp" else {"precision.compute": "fp32"}
        self.flags |= flags
        python = Path(sys.executable).parent
        lines = [
            f"VENV={sys.prefix}" if (python / "activate").exists() else f"export PATH={python}:$PATH",
            f"RUNS={self.home}/runs",
            "MIN_FREE_GB=1",
            "SHM_GB=0.001",
            "PREFLIGHT=no",
        ]
        (self.home / "site.sh").write_text("\n".join([*lines, site]) + "\n")
        self._write_recipe()

    # What the user does

    def _write_recipe(self):
        values = configuration.to_dict(configuration.load_recipe("demo"))
        for name, value in self.flags.items():
            section, key = name.split(".")
            values[section][key] = value
        (self.home / "recipe.yaml").write_text(yaml.safe_dump(values))

    def end_at(self, step):
        """The next start trains up to this step."""
        self.flags["run.max_steps"] = step
        self._write_recipe()

    def variables(self):
        return {
            "RECIPE": str(self.home / "recipe.yaml"),
            "RUN_NAME": self.name,
            "STRATEGY": self.strategy,
            "SITE": str(self.home / "site.sh"),
            "PROCESSES_PER_NODE": "1",
        }

    def submit(self, *options, nodes=2, script="slurm/200ep.sh", flags=(), **variables):
        """``sbatch`` -> job id."""
        output = f"--output={self.home}/job-%j.out"
        words = ["sbatch", "--parsable", f"--nodes={nodes}", *SMALL_JOB, output, *options, script, *flags]
        done = self.cluster.run(words, cwd=ROOT, **{**self.variables(), **variables})
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def signal(self, job, name="USR1"):
        """To the batch shell, as ``--signal=B:USR1@...`` and a preemption send it."""
        self.cluster.run(
            ["scancel", "--batch", f"--signal={name}", job], check=False
        )  # 229 for an array's task

    def cancel(self):
        for job in self.jobs:
            self.cluster.run(["scancel", job], check=False)

    # What is seen

    def field(self, job, name):
        """Of ``scontrol show job``."""
        done = self.cluster.run(["scontrol", "show", "job", "-o", job], check=False)
        found = [word for word in done.stdout.split() if word.startswith(f"{name}=")]
        return found[0].partition("=")[2] if found else ""

    def state(self, job):
        return self.field(job, "JobState")

    def restarts(self, job):
        return int(self.field(job, "Restarts"))

    def steps(self):
        """Finished steps, by the metrics."""
        return max((line["step"] for line in read_json_lines(self.path / "metrics.jsonl")), default=0)

    def attempts(self):
        return list(read_json_lines(self.path / "attempts.jsonl"))

    def ledger(self):
        """[(event, step, detail), ...]"""
        path = self.path / "slurm/ledger.tsv"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            (event, int(step), detail) for *_, event, step, detail in (line.split("\t") for line in lines)
        ]

    def events(self):
        return [event for event, *_ in self.ledger()]

    def saved(self):
        """The step of the newest checkpoint."""
        return read_values(latest(self.path / "checkpoints"))["step"]

    def said(self, job):
        path = self.home / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def story(self):
        """Everything that helps to see why a test fails."""
        files = [*sorted(self.home.glob("job-*.out")), self.path / "slurm/ledger.tsv"]
        files += sorted(self.path.glob("slurm/*/*.log"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    # Waiting

    def wait(self, condition, what):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{self.name}: never {what}\n{self.story()}"
            time.sleep(0.2)

    def wait_for_steps(self, job, more=2):
        """The current start has trained ``more`` steps beyond where it resumed."""

        def there():
            if self.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
                raise AssertionError(f"{self.name}: the job has ended\n{self.story()}")
            begun = self.attempts()
            # The number of starts is compared, for the metrics of the last one remain until the next resumes.
            return len(begun) > self.seen and self.steps() >= (begun[-1]["resumed_step"] or 0) + more

        self.wait(there, f"trained {more} steps after start {self.seen}")
        self.seen = len(self.attempts())

    seen = 0  # starts of the trainer that wait_for_steps has waited for

    def wait_for_event(self, event, times=1):
        self.wait(lambda: self.events().count(event) >= times, f"{event} in the ledger")

    def wait_until_over(self, job):
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.state(job) in over, f"over: job {job}")
        return self.state(job)

    # What must hold

    def check_done(self, end):
        """DONE at ``end``, and every image was trained on exactly as the pure order says."""
        assert (self.path / "DONE").exists(), self.story()
        assert json.loads((self.path / "DONE").read_text())["step"] == end
        self.check_audit(end)

    def check_audit(self, end):
        """``end`` steps, each image exactly as the pure order says."""
        audit = self.flags["data.audit"]
        assert read_audit(audit) == dict(enumerate(planned_keys(self.shards, self.flags, end)))
        assert incomplete_steps(audit) == {}
