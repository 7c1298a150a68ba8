"""A real SLURM cluster on this machine: a controller and nodes that can be switched off, each in its own namespaces.

Debian's packages are installed where they are missing; no systemd, docker or cgroups, nothing below /etc is written by
us, and the network is the cluster's own, so that several can run side by side. It ends with the process that
started it, however that ends.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "munged": "munge",
    "sbatch": "slurm-client",
    "ip": "iproute2",
    "unshare": "util-linux",
    "shellcheck": "shellcheck",
}
SCRIPT = Path(__file__).with_name("cluster.sh")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
GPUS = 8  # per node; not real
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # of <sys/prctl.h>

SLURM_CONF = """
ClusterName=caco
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
AuthType=auth/munge
# A requeued job waits for cred_expire seconds; 5 is the least, the default 120.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# The hardware is not what it says.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=100
# A silent node counts as lost after this; a killed job's processes have this long. Both generous: machines are busy.
SlurmdTimeout=20
KillWait=120
SlurmctldTimeout=60
MessageTimeout=60
UnkillableStepTimeout=300
MinJobAge=7200
InactiveLimit=0
Waittime=0
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,sched_min_interval=200000,bf_interval=5
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{controller_parameters}
AccountingStorageType=accounting_storage/none
MaxArraySize=1001
NodeName=n[1-{nodes}] Port=16818 CPUs=128 Boards=1 SocketsPerBoard=1 CoresPerSocket=128 ThreadsPerCore=1 \
RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=48:00:00 DefaultTime=30 PriorityTier=10
PartitionName=preemptible Nodes=ALL MaxTime=48:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=48:00:00 PriorityTier=100
"""


class CannotStart(Exception):
    """Why there is no cluster here."""


class Cluster:
    """A running cluster; use as a context. Nodes are n1, n2, ...

    Attributes:
        folder: seen alike by all nodes; ``folder/scratch`` is another disk on each, on n1 ``folder/disk/n1``, and
            ``folder/full`` a disk of one megabyte.
    """

    def __init__(self, num_nodes=6):
        self.num_nodes = num_nodes
        self.folder = None
        self._controller = None

    def __enter__(self):
        refuse_to_start()
        install()
        # Not pytest's own: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="caco-slurm-"))
        try:
            self._write_configuration()
            self._controller = self._unshare(SCRIPT, "controller", self.folder, self.num_nodes)
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self._controller:
            self._controller.kill()  # its child, process 1 of the cluster, goes with it, and everything with that
            self._controller.wait()
        for _ in range(50):  # the last of them may still be on their way out
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    # Starting

    def _write_configuration(self):
        for name in ("etc", "munge", "state", "log", "pid", "spool", "gpu", "full", "scratch"):
            (self.folder / name).mkdir()
        nodes = range(1, self.num_nodes + 1)
        for node in nodes:
            (self.folder / f"disk/n{node}").mkdir(parents=True)
            (self.folder / f"spool/n{node}").mkdir()
        for gpu in range(GPUS):  # SLURM wants a character device
            (self.folder / f"gpu/nvidia{gpu}").symlink_to("/dev/null")
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        hosts = ["127.0.0.1 localhost", "10.77.0.254 ctl", *(f"10.77.0.{node} n{node}" for node in nodes)]
        files = {
            "hosts": "\n".join(hosts) + "\n",
            "resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
            "slurm.conf": self._slurm_conf("SlurmctldParameters=preempt_send_user_signal"),
            "gres.conf": f"NodeName=n[1-{self.num_nodes}] Name=gpu File={self.folder}/gpu/nvidia[0-{GPUS - 1}]\n",
            # slurmd initialises a cgroup plugin whatever it is for; v1 is lazy and touches nothing.
            "cgroup.conf": f"CgroupPlugin={'cgroup/v1' if version() < (23, 11) else 'disabled'}\n",
            "plugstack.conf": "",
        }
        for name, text in files.items():
            (self.folder / "etc" / name).write_text(text)

    def _slurm_conf(self, controller_parameters):
        return SLURM_CONF.format(
            folder=self.folder,
            nodes=self.num_nodes,
            gpus=GPUS,
            controller_parameters=controller_parameters,
        )

    def _unshare(self, *words):
        """A process in namespaces of its own that dies with this one."""
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc", *map(str, words)]
        log = open(self.folder / "log/controller.out", "a")  # noqa: SIM115, the child's
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": PATH},
            start_new_session=True,
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0),
        )

    def _wait_until_up(self, seconds=120):
        deadline = time.monotonic() + seconds
        while self.states() != ["idle"] * self.num_nodes:
            if self._controller.poll() is not None or time.monotonic() > deadline:
                logs = sorted((self.folder / "log").iterdir())
                tails = "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)
                raise CannotStart(f"the nodes are {self.states()} after {seconds} seconds\n{tails}")
            time.sleep(0.2)

    def states(self):
        """Of every node: idle, allocated, mixed, down, ..."""
        done = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], check=False)
        return done.stdout.split()

    # Using

    def inner_pid(self):
        """The cluster's process 1, as this machine numbers it."""
        pid = self._controller.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return children[0] if children else None

    def run(self, command, cwd="/", check=True, timeout=120, **variables):
        """A command on the controller's host, as a user there -> CompletedProcess."""
        pid = self.inner_pid()
        if pid is None:
            return subprocess.CompletedProcess(command, 1, "", "not there yet")
        enter = [
            "nsenter",
            "-t",
            pid,
            "-n",
            "-m",
            "-u",
            "-i",
            "-p",
            "--",
            "bash",
            "-c",
            'cd "$0" && exec "$@"',
        ]
        done = subprocess.run(
            [*enter, str(cwd), *map(str, command)],
            env={**clean_environment(), "SLURM_CONF": f"{self.folder}/etc/slurm.conf", **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def on_node(self, node, command):
        """A command within the namespaces of a node."""
        pid = (self.folder / "pid" / node).read_text().strip()
        inner = f"$(cat /proc/{pid}/task/{pid}/children)"
        return self.run(["bash", "-c", f"nsenter -t {inner} -n -m -u -i -p -- {command}"])

    def power_off(self, node):
        """Nothing on the node gets a chance to handle it."""
        self.run(["kill", "-KILL", (self.folder / "pid" / node).read_text().strip()])

    def power_on(self, node):
        """Its job is gone, its disk is not."""
        inside = f"setsid {SCRIPT} node {self.folder} {node[1:]} > {self.folder}/log/{node}.out 2>&1 &"
        self.run(["bash", "-c", inside])

    def send_user_signal(self, wanted):
        """Whether a preempted job's ``--signal`` reaches its batch shell; without, its steps alone get SIGTERM."""
        text = self._slurm_conf("SlurmctldParameters=preempt_send_user_signal" if wanted else "")
        (self.folder / "etc/slurm.conf").write_text(text)
        self.run(["scontrol", "reconfigure"])


def clean_environment():
    """This process's, without what SLURM or a site file left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "CACO"))}
    return {**kept, "PATH": PATH, "OMP_NUM_THREADS": "1"}


def version():
    """(year, month) of the installed SLURM."""
    done = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True, env={"PATH": PATH})
    return tuple(int(number) for number in done.stdout.split()[1].split(".")[:2])


def missing():
    """Packages whose program is not there."""
    return [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]


def refuse_to_start():
    """CannotStart where no cluster can be made: not root, not Debian, no namespaces."""
    if os.geteuid():
        raise CannotStart("only root can give each node a network of its own")
    if missing() and not (shutil.which("apt-get") and Path("/etc/debian_version").exists()):
        raise CannotStart(f"this is no Debian and lacks {', '.join(missing())}")
    unshare = shutil.which("unshare", path=PATH)
    if unshare:
        probe = "ip link add br0 type bridge && mount -t tmpfs tmpfs /mnt"
        words = [unshare, *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", probe]
        done = subprocess.run(words, capture_output=True, text=True, env={"PATH": PATH})
        if done.returncode and shutil.which("ip", path=PATH):
            raise CannotStart(f"no namespaces or no bridge here: {done.stderr.strip()}")


def install():
    """What is missing, by apt-get; nothing is started."""
    if not missing():
        return
    # A package's own start of its daemons is refused, where this file says so.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    wait = ["-qq", "-o", "DPkg::Lock::Timeout=300"]
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing()]):
            done = subprocess.run(
                ["apt-get", *wait, *words],
                env={**os.environ, "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=900,
            )
            if done.returncode:
                raise CannotStart(f"apt-get {words[0]} failed: {(done.stdout + done.stderr)[-500:]}")
    finally:
        if made:
            policy.unlink()
