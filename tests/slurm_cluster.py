"""A real Slurm for as long as a test session: a controller and two nodes on the loopback address.

Its configuration, keys, sockets and logs are in a folder of its own, and its ports are free ones,
so that it touches no other cluster and several sessions may run at once. Two cores pose as two
nodes of eight. Jobs of the partition urgent preempt others, which have a minute of grace.
"""

import contextlib
import getpass
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # daemons: not on the path of every user
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}
CONF = """
ClusterName=paperflows-tests
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters={listen}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
MinJobAge=3600
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs=8 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs=8 RealMemory=8000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=2
"""


def missing() -> list[str]:
    """The programs of Slurm and munge that are not installed here."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def wait_for(condition, seconds: float, what: str):
    """The first true value of `condition()`.

    AssertionError, so that a hang is a failure: there is none within `seconds`. `what` was waited
    for, a text or a function that returns one.
    """
    deadline = time.monotonic() + seconds
    value = condition()
    while not value:
        if time.monotonic() > deadline:
            text = what() if callable(what) else what
            raise AssertionError(f"waited {seconds:.0f} s in vain for {text}")
        time.sleep(0.1)
        value = condition()
    return value


class Cluster:
    """A cluster inside `with Cluster(folder) as cluster:`.

    `cluster.folder` holds slurm.conf and the daemons' logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.daemons = []
        ours = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "SBATCH", "SRUN", "SCANCEL"))
        }
        self.environment = {
            **ours,
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            # Lightning's rendezvous is the name of the first node, and n1 resolves nowhere.
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def __enter__(self) -> "Cluster":
        self.folder.chmod(0o755)  # munge's socket has to be reachable
        self._configure()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _configure(self) -> None:
        host = socket.gethostname()
        address = "127.0.0.1"
        listen = ""
        with contextlib.suppress(OSError):
            resolved = socket.gethostbyname(host)
            if resolved.startswith("127."):  # daemons bind to where the host resolves to
                address = resolved
                listen = "NoInAddrAny,NoCtldInAddrAny"
        # The port at which ranks meet follows from the job's number.
        first_job = random.SystemRandom().randrange(1, 9000)
        settings = {
            "folder": self.folder,
            "host": host,
            "address": address,
            "listen": listen,
            "first_job": first_job,
        }
        text = CONF.format(**settings, user=getpass.getuser(), ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))

    def _start(self) -> None:
        files = {kind: self.folder / f"munge.{kind}" for kind in ("key", "pid", "seed", "log")}
        options = [f"--{kind}-file={path}" for kind, path in files.items()]
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder / 'munge.socket'}",
            *options,
        )
        wait_for((self.folder / "munge.socket").exists, 10, self.logs)
        conf = self.environment["SLURM_CONF"]
        self._daemon("slurmctld", "-D", "-c", "-f", conf)
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-f", conf, "-N", node)
        wait_for(
            lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2", 30, self.logs
        )

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}-{len(self.daemons)}.out").open("wb") as log:
            command = [shutil.which(program, path=PATH), *arguments]
            # A session of its own: Ctrl-C goes to pytest, which then stops jobs before daemons.
            daemon = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def stop(self) -> None:
        """Cancel what runs, then end the daemons: a slurmd waits for its jobs."""
        with contextlib.suppress(AssertionError, OSError, subprocess.SubprocessError):
            for job in self.run("squeue", "-h", "-o", "%A").split():
                self.run("scancel", "--signal=KILL", "--full", job, check=False)
                self.run("scancel", job, check=False)
            wait_for(lambda: not self.run("squeue", "-h"), 30, "the last jobs to end")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def logs(self) -> str:
        """What to read when something went wrong: the last lines of every daemon."""
        return "\n".join(
            f"{path.name}: {_tail(path)}" for path in sorted(self.folder.glob("*.out"))
        )

    def run(self, *command: str, check: bool = True, **keywords) -> str:
        """Output of a client command (sbatch, scontrol ...), stripped."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **keywords,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dict: JobState, Restarts, ExitCode, Reason, JobName ..."""
        words = re.findall(
            r"(?:^|\s)(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)
        )
        return dict(words)

    def wait(self, job: str, seconds: float, *states: str) -> dict[str, str]:
        """The job as it is when it reaches one of `states`, by default when it has ended."""
        awaited = set(states) or ENDED
        wait_for(
            lambda: self.job(job)["JobState"] in awaited,
            seconds,
            lambda: f"{job} to be {awaited}: {self.job(job)}",
        )
        return self.job(job)


def _free_ports(n: int) -> list[int]:
    """Ports that nobody listens on; asked for together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-5:])
