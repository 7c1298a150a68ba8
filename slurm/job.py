"""One start of a job, from its checks to its end: what is decided before, while and after the trainer runs.

A job script sources lib.sh, which reads the site file and becomes this program:
``job.py train|evaluate N WORD... M WORD... FLAG...``, with the N words that stand before every command on a node, the M
options of srun, and the trainer's flags. All else comes in variables. Nothing here is put into a shell's text.

It runs on the batch host, outside of the project's environment where that is a container: the standard library alone,
and Python 3.6. What is decided stands in decisions.py; the classes here ask SLURM and the disk, and act.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime
from typing import List

sys.dont_write_bytecode = True  # no __pycache__ beside the scripts, of whatever Python the batch host has

import host
from decisions import (
    bad_nodes,
    ended,
    errors_of,
    first_complaint,
    is_worth_staying,
    job_fields,
    newest_step,
    read_history,
    rendezvous_port,
    warnings_of,
    why_give_up,
    would_train,
)
from host import (
    LEFT_TO_SLURM,
    MISTAKE,
    NO_PROGRESS,
    Signals,
    as_a_child,
    die,
    mtime,
    patiently,
    read,
    run,
    say,
    write,
)


class Job:
    """What SLURM and the site file say of this job, and the steps that it runs."""

    def __init__(self, container: List[str], srun_options: List[str], flags: List[str]) -> None:
        self.signals = Signals()
        self.container, self.srun_options, self.flags = container, srun_options, flags
        env = os.environ
        self.root, self.runs, self.nodelist = env["CACO_ROOT"], env["RUNS"], env["SLURM_JOB_NODELIST"]
        self.job = env["SLURM_JOB_ID"]
        if env.get("SLURM_ARRAY_JOB_ID"):  # the number of an array's last task is that of the whole array
            self.job = "{}_{}".format(env["SLURM_ARRAY_JOB_ID"], env["SLURM_ARRAY_TASK_ID"])
        self.restart = int(env.get("SLURM_RESTART_COUNT") or 0)
        self.requeues = env["REQUEUE"] == "yes"
        self.asked = env.get("CACO_ASKED", "")  # the signal that reached this job, if any
        self.again = 0  # starts of this job that came after a failure, without a requeue
        self.bad_nodes = []  # type: List[str]
        self.label = host.label = f"{self.job}.{self.restart}"

    def describe(self) -> None:
        """How the processes find each other, and what they are told of the job."""
        env = os.environ
        self.gpus = env.get("SLURM_GPUS_ON_NODE") or "0"
        self.nodes = int(env["SLURM_NNODES"])
        each = env.get("PROCESSES_PER_NODE") or ("" if self.gpus == "0" else self.gpus)
        if not each:
            die(
                "the job has no GPUs: give sbatch --gpus-per-node=N, or PROCESSES_PER_NODE=1 to train on CPUs"
            )
        if not re.match(r"[1-9][0-9]{0,8}$", each):
            die(f"PROCESSES_PER_NODE is {shlex.quote(each)}, which is no whole number: correct it")
        self.processes = self.nodes * int(each)
        self.hosts = (patiently(1, ["scontrol", "show", "hostnames", self.nodelist]) or "").split()
        if not self.hosts:
            die(f"scontrol show hostnames {self.nodelist} fails: no node is known")
        env["MASTER_ADDR"] = self.hosts[0]
        self.choose_port()
        env["SLURM_JOB_END_TIME"] = self._end()
        if self.gpus == "0":
            env["CUDA_VISIBLE_DEVICES"] = ""  # said aloud: the CPU is meant
        env["SLURM_EXPORT_ENV"] = "ALL"  # to srun's tasks, also where sbatch was told to hand nothing on
        # The launcher kills trainers so many seconds after a SIGTERM; its default of 30 is less than a save may take.
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

    def choose_port(self) -> None:
        self.port = rendezvous_port(int(os.environ["SLURM_JOB_ID"]), self.restart + 1000 * self.again)
        os.environ["MASTER_PORT"] = str(self.port)

    def field(self, name: str, tries: int = 13) -> str:
        """Of what SLURM says of this job; nothing where it does not answer for two minutes, which says nothing."""
        return job_fields(patiently(tries, ["scontrol", "show", "job", "-o", self.job]) or "").get(name, "")

    def _end(self) -> str:
        """Seconds since 1970 at which the job ends, nothing where it has no end. SLURM 22.05 does not say so itself."""
        try:
            return str(int(time.mktime(time.strptime(self.field("EndTime"), "%Y-%m-%dT%H:%M:%S"))))
        except ValueError:
            return ""

    def hear(self, seconds: float = 0) -> bool:
        """Takes the signals that have come, or the first within ``seconds``; did one come that counts?"""
        name = self.signals.take(seconds)
        while name == "CHLD" or (name and not self.on_signal(name)):
            name = self.signals.take()
        return bool(name)

    def on_signal(self, name: str) -> bool:
        """One has come -> whether the step that runs must be looked at, at once."""
        raise NotImplementedError

    def start_step(self, log: str, command: List[str]) -> "subprocess.Popen[bytes]":
        """One process per node."""
        width = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]
        width += ["--cpus-per-task=" + (os.environ.get("SLURM_CPUS_PER_TASK") or "1")]
        # srun's tasks ignore what is meant for the trainer, whose own handlers come with Python.
        ignoring = ["bash", "-c", 'trap "" USR1 USR2; exec "$@"', "step"]
        words = ["srun", *width, "--kill-on-bad-exit=1", "--wait=300", *self.srun_options, "--output=" + log]
        return subprocess.Popen(words + ignoring + self.container + command, preexec_fn=as_a_child)

    def launcher(self, strategy: str) -> List[str]:
        """``accelerate launch`` on every node, up to the name of the module."""
        config = os.path.join(self.root, "ds_configs", strategy + ".yaml")
        text = 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'  # its own on every node
        words = ["--config_file", config, "--num_machines", str(self.nodes)]
        words += ["--num_processes", str(self.processes), "--main_process_ip", self.hosts[0]]
        return ["bash", "-c", text, "launcher", *words, "--main_process_port", str(self.port + 1), "-m"]

    def on_one_node(self, command: List[str], **options) -> "subprocess.CompletedProcess[str]":
        """In the project's environment, here; where that is an image for srun's own containers, in a step."""
        step = []  # type: List[str]
        if any("--container-image" in option for option in self.srun_options):
            step = ["srun", "--nodes=1", "--ntasks=1", *self.srun_options]
        return run(step + self.container + command, **options)

    # After the end

    def taken_away(self) -> bool:
        """SLURM has taken the job away (scancel, an admin's requeue, a node lost): it knows what comes next."""
        state = self.field("JobState")
        return state not in ("", "RUNNING") and self.field("Reason") != "TimeLimit"

    def requeue(self) -> bool:
        """Once more where it fails: after the controller answers again."""
        command = ["scontrol", "requeue", self.job]
        return run(command).returncode == 0 or bool(self.field("JobState") and run(command).returncode == 0)

    def come_back(self, how: str) -> None:
        """Ends this start; the job is requeued where it may be."""
        if self.taken_away():
            say("ended by SLURM, which decides what comes next")
            sys.exit(LEFT_TO_SLURM)
        if not self.requeues or self.field("Requeue") == "0":
            self.leave_out_bad([])
            say("no requeue here: the next link of the chain, or the same sbatch, goes on")
            sys.exit(how != "stopped")
        self.signals.ignore_term()
        if not self.requeue():
            say("error: scontrol requeue fails: submit again, it resumes", sys.stderr)
            sys.exit(1)
        # It is pending now, and this process has the time until SLURM kills it.
        self.leave_out_bad([self.job])
        sys.exit(0)

    def leave_out_bad(self, jobs: List[str]) -> None:
        """``jobs``, and what is pending of this one's chain, will not run on the bad nodes."""
        if not self.bad_nodes:
            return
        name, whose = os.environ.get("SLURM_JOB_NAME", ""), str(os.getuid())
        pending = patiently(1, ["squeue", "-h", "-u", whose, "-n", name, "-t", "PENDING", "-o", "%A"]) or ""
        for job in jobs + [other for other in pending.split() if other != self.job]:
            fields = job_fields(patiently(1, ["scontrol", "show", "job", "-o", job]) or "")
            before = fields.get("ExcNodeList", "(null)")
            nodes = ",".join(([] if before == "(null)" else [before]) + self.bad_nodes)
            if run(["scontrol", "update", "JobId=" + job, "ExcNodeList=" + nodes]).returncode == 0:
                say("job {} leaves out {}".format(job, ",".join(self.bad_nodes)))


class Training(Job):
    """A job that trains: ``train`` is the order of a start."""

    def __init__(self, *words: List[str]) -> None:
        super().__init__(*words)
        env = os.environ
        self.recipe, self.strategy, self.run_dir = env["RECIPE"], env["STRATEGY"], env["RUN_DIR"]
        self.ledger = os.path.join(self.run_dir, "slurm", "ledger.tsv")
        self.logs = os.path.join(self.run_dir, "slurm", f"{self.job}.{self.restart}")
        # The jobs that carry one submission on share a count of failures; a submission by hand begins a new one.
        self.chain = env.get("CACO_CHAIN") or env.get("SLURM_ARRAY_JOB_ID") or env["SLURM_JOB_ID"]
        self.cache = ["--data.cache_dir", env["CACHE_DIR"]] if env.get("CACHE_DIR") else []
        self.exit_code, self.can_note = 0, False

    def train(self) -> None:
        """The life of one start."""
        try:
            self.make_places()
        except OSError:
            die(f"cannot write {self.logs}: fix its rights or free its disk, or give another RUNS or RUN_DIR")
        self.leave_if_over()
        self.describe()
        self.refuse_to_loop()
        self.refuse_company()
        self.check_before_start()
        while True:  # again on the same nodes, or this process ends
            self.note("start", self.nodelist)
            # Whatever fails, the end is reached, where it is decided what comes next.
            try:
                self.snapshot()
                self.preflight()
                self.launch()
            except Exception:
                traceback.print_exc()
                self.exit_code = 1
            self.conclude(may_stay=True)
            self.begin_again()

    def begin_again(self) -> None:
        """The next start is in this job, with logs and ports of its own."""
        self.again += 1
        self.label = host.label = f"{self.job}.{self.restart}.{self.again}"
        self.logs = os.path.join(self.run_dir, "slurm", self.label)
        self.exit_code = 0
        try:
            self.make_places()
        except OSError as error:
            say(f"cannot write {self.logs} ({error.strerror})")
            self.come_back("failed")
        self.choose_port()

    def make_places(self) -> None:
        """The folder of this start, and when it began. OSError where it cannot be written."""
        os.makedirs(self.logs, exist_ok=True)
        write(os.path.join(self.logs, "started"), time.strftime("%F %T\n"))
        latest = os.path.join(self.run_dir, "slurm", "latest")
        if os.path.islink(latest):
            os.unlink(latest)
        os.symlink(os.path.basename(self.logs), latest)
        self.can_note = True
        # On a NCCL time-out every rank leaves its last collectives here (torch's flight recorder).
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"], os.environ["TORCH_FR_BUFFER_SIZE"] = "1", "2000"
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = os.path.join(self.logs, "flight_")

    # The ledger: a line per start and per end, so that a job that cannot progress stops instead of looping

    def newest_step(self) -> int:
        try:
            return newest_step(os.listdir(os.path.join(self.run_dir, "checkpoints")))
        except OSError:
            return 0

    def note(self, event: str, detail: str) -> None:
        """time, chain, job.restart, event, step of the newest checkpoint, detail"""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        words = [now, self.chain, self.label, event, str(self.newest_step()), detail]
        try:
            write(self.ledger, "\t".join(words) + "\n", "a")
        except OSError as error:
            say(f"the ledger cannot be written ({error.strerror}): {event} {detail}")

    def refuse_to_loop(self) -> None:
        """Ends the job where starting again has not helped."""
        self.history = read_history(read(self.ledger).splitlines(), self.chain, self.newest_step())
        limits = [int(os.environ[name]) for name in ("MAX_FAILURES", "MAX_STARTS_PER_STEP", "MAX_STARTS")]
        why = why_give_up(self.history, *limits)
        if why:
            self.note("gave-up", why)
            see = f"see {self.run_dir}/slurm/*/node*.log, fix it and submit again"
            say(f"error: {why} at step {self.newest_step()}: {see}", sys.stderr)
            sys.exit(NO_PROGRESS)

    # Before a start: everything that can be known before many GPUs are in use

    def leave_if_over(self) -> None:
        """Nothing to do, or not wanted: exit 0, so that the later links of a chain cost nothing."""
        if os.path.exists(os.path.join(self.run_dir, "DONE")) and not os.environ.get("EXTEND"):
            longer = "EXTEND=yes trains on, with a larger --optim.epochs or --run.max_steps"
            say(f"{self.run_dir} is DONE: nothing to do ({longer})")
            sys.exit(0)
        if self.is_told_to_stop():
            say(f"{self.run_dir}/STOP is there: remove it to train on")
            sys.exit(0)

    def is_told_to_stop(self) -> bool:
        return os.path.exists(os.path.join(self.run_dir, "STOP"))

    def refuse_company(self) -> None:
        """Two jobs in one run directory would undo each other's work."""
        place = os.path.join(self.run_dir, "slurm", "owner")
        other = read(place).strip()
        running = ["squeue", "-h", "-j", other, "-t", "RUNNING", "-o", "%A"]
        if other not in ("", self.job) and patiently(1, running):
            where = f"end it (scancel {other}), or give this one another RUN_NAME"
            die(f"job {other} trains in {self.run_dir}: {where}")
        with contextlib.suppress(OSError):
            write(place, self.job + "\n")

    def check_before_start(self) -> None:
        """Seconds on one CPU: space, strategy, then the doctor: recipe, flags, shards, batch arithmetic, memory."""
        folder = os.path.join(self.root, "ds_configs")
        config = os.path.join(folder, self.strategy + ".yaml")
        if not os.path.isfile(config):
            known = sorted(name[: -len(".yaml")] for name in os.listdir(folder) if name.endswith(".yaml"))
            die("STRATEGY={} has no {}: give one of {}".format(self.strategy, config, " ".join(known)))
        for flag in self.flags:
            if flag.startswith(("--run.dir", "--run-dir")):
                die(f"{flag}: name the run by RUN_NAME, RUNS or RUN_DIR")
        least, free = int(os.environ["MIN_FREE_GB"]), shutil.disk_usage(self.run_dir).free // 10**9
        if free < least:
            fix = "free some, or give another RUNS"
            self.refuse_start(f"{free} GB free at {self.run_dir}, less than MIN_FREE_GB={least}: {fix}")
        if self.history.last_event == "stopped" and self.restart > 0:
            return  # it trained a moment ago, as it is
        place = os.path.join(self.logs, "doctor.log")
        words = [
            "python",
            "-m",
            "caco_scale.doctor",
            self.recipe,
            *self.cache,
            *self.flags,
            "--run.dir",
            self.run_dir,
        ]
        words += ["--processes", str(self.processes), "--strategy", self.strategy]
        with open(place, "w") as stream:
            is_fine = self.on_one_node(words, stdout=stream, stderr=subprocess.STDOUT).returncode == 0
        log = read(place)
        if is_fine:
            return
        if not would_train(log):
            self.refuse_start(f"{first_complaint(log)} (all in {place})")
        for line in warnings_of(log):  # whoever submits may know better
            say("warning: " + line)

    def refuse_start(self, why: str) -> None:
        """A mistake at the first start of a submission. Later its storage may only be away: a failed start."""
        if not self.history.all_starts:
            die(why)
        say("error: " + why, sys.stderr)
        self.note("start", self.nodelist)
        self.exit_code = MISTAKE
        self.conclude()

    def snapshot(self) -> None:
        """What was started first, to be read years later; a later start from other code says so."""
        try:
            self._take_snapshot()
        except OSError as error:
            say(f"warning: no snapshot of what is started ({error})")

    def _take_snapshot(self) -> None:
        folder, code = os.path.join(self.run_dir, "slurm", "snapshot"), self.code()
        if os.path.isdir(folder):
            first = read(folder, "commit").strip()
            if first != code:
                say(f"warning: the run began with {first}, this start has {code}")
            return
        os.makedirs(folder)
        given = ["RECIPE=" + self.recipe, "STRATEGY=" + self.strategy, "RUN_DIR=" + self.run_dir]
        texts = {
            "commit": code + "\n",
            "command": " ".join(map(shlex.quote, [*given, self.script(), *self.flags])),
        }
        if self.in_checkout():
            texts["changes.diff"] = self.output_of(["git", "-C", self.root, "diff", "HEAD"])
        texts["recipe.yaml"] = self.recipe_text()
        for name, text in texts.items():
            write(os.path.join(folder, name), text)
        shutil.copy(self.script(), os.path.join(folder, "job.sh"))
        site = os.environ.get("SITE") or os.path.join(self.root, "slurm", "site.sh")
        stem = os.path.join(self.root, "ds_configs", self.strategy)
        for place in (stem + ".yaml", stem + ".json", site):
            if os.path.isfile(place):
                shutil.copy(place, folder)

    def script(self) -> str:
        return os.environ["CACO_SCRIPT"]

    def recipe_text(self) -> str:
        ours = os.path.join(self.root, "caco_scale", "recipes", self.recipe + ".yaml")
        text = read(self.recipe) or read(ours)
        if text:
            return text
        source = "import sys; from caco_scale import shipped; print(shipped.place(sys.argv[1]).read_text(), end='')"
        return self.output_of(["python", "-c", source, f"recipes/{self.recipe}.yaml"], here=False)

    def in_checkout(self) -> bool:
        """Is the root the code itself, or a folder that ``caco slurm init`` has filled, beside an installed package?"""
        return os.path.exists(os.path.join(self.root, "caco_scale", "__init__.py"))

    def code(self) -> str:
        """A checkout's commit, or the installed version."""
        if self.in_checkout():
            found = self.output_of(["git", "-C", self.root, "rev-parse", "HEAD"])
        else:
            version = 'import caco_scale; print("caco_scale", caco_scale.__version__)'
            found = self.output_of(["python", "-c", version], here=False)
        return found.strip() or "unknown"

    def output_of(self, command: List[str], here: bool = True) -> str:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return (run(command, **options) if here else self.on_one_node(command, **options)).stdout

    def preflight(self) -> None:
        """Every node looks at itself and at the others; bad ones are left out, and the job comes back without them."""
        if os.environ["PREFLIGHT"] != "yes":
            return
        place = os.path.join(self.logs, "preflight.log")
        words = [
            "python",
            "-m",
            "caco_scale.doctor.preflight",
            "--gpus",
            self.gpus,
            "--shm-gb",
            os.environ["SHM_GB"],
        ]
        self.run_step(place, [*words, "--hosts", ",".join(self.hosts)])  # there is no scontrol in a container
        if self.exit_code == 0:
            return
        log = read(place)
        bad = bad_nodes(log)
        said = re.findall(r"^bad node.*", log, re.M) or re.findall(r"^(?:no node|error:).*", log, re.M)[:1]
        print("\n".join(said), flush=True)
        if self.nodes > 1 and len(bad) == self.nodes:
            fix = "fix what it says of them, or SHM_GB"
            say("error: no node passes the preflight, so none is left out: " + fix, sys.stderr)
        else:
            self.bad_nodes = bad
        self.conclude()

    # Running, and being told to stop

    def on_signal(self, name: str) -> bool:
        """SLURM warns of the time limit or a preemption, or somebody said scancel --batch; or SLURM ends the job."""
        if name == "TERM":
            if self.asked != "TERM" and self.can_note:
                self.note("terminated", "SIGTERM")
            self.asked = "TERM"
            say("SIGTERM")
        else:
            self.asked = self.asked or name
            say(f"SIG{name}: asking the trainer for its last checkpoint")
        return True

    def has_saved(self) -> bool:
        """The trainer of this start has stopped in good order."""
        return mtime(self.run_dir, "INTERRUPTED") > mtime(self.logs, "started")

    def run_step(self, log: str, command: List[str]) -> None:
        """Returns when it has ended; a start that is asked to stop before it trains does not begin to."""
        self.hear()
        if self.asked:
            return
        step, told = self.start_step(log, command), 0
        while True:
            heard = self.hear()
            if step.poll() is not None:
                break
            if not heard:
                self.hear(2)
            if not self.asked or step.poll() is not None:
                continue
            # Again and again until it has saved: the first may come before there is a trainer to hear it.
            if not self.has_saved():
                if told % 5 == 0:
                    step.send_signal(signal.SIGUSR1)
                told += 1
            if self.asked == "TERM" and self.field("Reason", 1) == "TimeLimit":
                break  # nothing will be heard of it
        code = step.returncode
        self.exit_code = LEFT_TO_SLURM if code is None else 128 - code if code < 0 else code

    def launch(self) -> None:
        """The trainer on all nodes, one launcher on each."""
        what = f"{self.recipe}, {self.strategy}, {self.processes} process(es)"
        say(f"step {self.newest_step()} on {self.nodelist}: {what}; logs in {self.logs}")
        words = [*self.launcher(self.strategy), "caco_scale.pretrain", self.recipe, "--run.dir", self.run_dir]
        words += ["--run.world_size", str(self.processes), *self.cache, *self.flags]
        self.run_step(os.path.join(self.logs, "node%n.log"), words)

    def conclude(self, may_stay: bool = False) -> None:
        """After the end of the step: done, or again, or SLURM's affair. Returns where this job starts once more."""
        self.hear()
        has_saved = self.has_saved()
        taken = bool(self.asked) and not has_saved and self.taken_away()
        how = ended(self.exit_code, self.asked, has_saved, taken, self.bad_nodes)
        # Of this start, not of the end that EXTEND goes beyond; a trainer that finds nothing to do leaves it as it was.
        done = mtime(self.run_dir, "DONE")
        if done > mtime(self.logs, "started") or (done and (how, self.exit_code) == ("failed", 0)):
            self.note("done", "")
            say(f"DONE at step {self.newest_step()}")
            sys.exit(0)
        nodes = ",".join(self.bad_nodes)
        self.note(how, "rc={} asked={} {}".format(self.exit_code, self.asked or "no", nodes))
        say(f"{how} at step {self.newest_step()}")
        if self.exit_code:
            names = sorted(name for name in os.listdir(self.logs) if re.match(r"node.*\.log$", name))
            for line in errors_of(read(self.logs, name) for name in names):
                print(line, flush=True)
        if self.is_told_to_stop():
            say(f"{self.run_dir}/STOP is there: remove it and submit again")
            sys.exit(0)
        if may_stay and how == "failed" and not self.asked and self.stays():
            say("once more on the same nodes")
            return
        self.come_back(how)

    def stays(self) -> bool:
        """Is the allocation whole, and the next start worth a try in it, before SLURM's queue is asked again?"""
        history = read_history(read(self.ledger).splitlines(), self.chain, self.newest_step())
        return (
            is_worth_staying(history, int(os.environ["MAX_FAILURES"])) and self.field("JobState") == "RUNNING"
        )


class Evaluation(Job):
    """A job that evaluates: it saves when it is stopped, and comes back until there is a result."""

    has_requeued = False

    def on_signal(self, name: str) -> bool:
        """The job's end is near: it is requeued at once, and SLURM's SIGTERM has the evaluation save."""
        if name in ("USR1", "USR2") and not self.has_requeued:
            say(f"SIG{name}: the job's end is near")
            if self.requeues and not self.requeue():
                say("scontrol requeue fails: submit again, it resumes")
            self.has_requeued = True
        return False

    def evaluate(self) -> None:
        """The evaluation on all nodes; its result, or the job once more."""
        logs = os.path.join(self.runs, "evaluate", "slurm", f"{self.job}.{self.restart}")
        try:
            os.makedirs(logs, exist_ok=True)
        except OSError:
            die(f"cannot write {logs}: give another RUNS")
        self.describe()
        kind, processes = os.environ["EVALUATION"], str(self.processes)
        where = f"{self.nodelist}, {processes} process(es); logs in {logs}"
        say(f"{kind} evaluation of {self.flags[0]} on {where}")
        command = [*self.launcher("ddp"), "caco_scale.evaluate", kind, *self.flags, "--world_size", processes]
        step = self.start_step(os.path.join(logs, "node%n.log"), command)
        while step.poll() is None:
            self.hear(60)
        log = read(logs, "node0.log")
        print(log, end="", flush=True)
        # One that was stopped has saved and ends with 0, but there is no result: this job is not COMPLETED.
        if step.returncode or not re.search(r"^stopped by SIG[A-Z0-9]* after step", log, re.M):
            sys.exit(step.returncode if step.returncode >= 0 else 128 - step.returncode)
        self.come_back("unfinished")


def main(words: List[str]) -> None:
    kind, rest = words[0], words[1:]
    lists = []
    for _ in range(2):  # counted, for any word may stand in them
        count = int(rest[0])
        lists.append(rest[1 : 1 + count])
        rest = rest[1 + count :]
    if kind == "train":
        Training(*lists, rest).train()
    else:
        Evaluation(*lists, rest).evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
