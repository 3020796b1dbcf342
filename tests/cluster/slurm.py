"""A real Slurm for tests: a controller here, and a node in each namespace of `hosts.Hosts`.

Everything it writes lies in one directory, and it ends by the processes that it started. It has
these partitions: `main` of the first four nodes, whose jobs those of `high` preempt, `wide` of all
nodes, and `narrow`, which takes jobs of one node and ten minutes at most.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from tests.cluster.hosts import Hosts

PROGRAMS = ('slurmctld', 'slurmd', 'sbatch', 'munged')
INSTALL = 'apt-get install --no-install-recommends slurmctld slurmd slurm-client munge'
ACCOUNTING_INSTALL = 'apt-get install --no-install-recommends mariadb-server slurmdbd'

# cred_expire: a requeued job waits so long and a second more, 121 s by default.
_CONF = """\
ClusterName=testcluster
SlurmctldHost=ctl({ctl})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool-%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,requeue_delay=1
MinJobAge={age}
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
NodeName=node[1-{n}] NodeAddr={net}.[1-{n}] CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 \
ThreadsPerCore=1 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=node[1-{m}] Default=YES MaxTime=60 PriorityTier=1 GraceTime=30
PartitionName=high Nodes=node[1-{m}] MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime=30
PartitionName=narrow Nodes=node1 MaxTime=10 MaxNodes=1 PriorityTier=1
"""

_NO_ACCOUNTING = """\
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
"""

# AccountingStoragePass is the socket of munge.
_ACCOUNTING = """\
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={d}/munge.sock
AccountingStorageEnforce=associations,qos
"""

_DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={d}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db_port}
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct
PidFile={d}/slurmdbd.pid
"""
_DBD_PORT, _DB_PORT = 16819, 13306

_TABLES = """\
create database slurm_acct;
create user 'slurm'@'127.0.0.1' identified by 'x';
grant all on slurm_acct.* to 'slurm'@'127.0.0.1';
"""


def missing(accounting: bool = False) -> str:
    """Says which programs are missing and what installs them, or returns ''."""
    wanted = dict.fromkeys(PROGRAMS, INSTALL)
    if accounting:
        wanted.update(mariadbd=ACCOUNTING_INSTALL, slurmdbd=ACCOUNTING_INSTALL)
    lacking = [name for name in wanted if not shutil.which(name)]
    return f'{", ".join(lacking)}: try {wanted[lacking[0]]}' if lacking else ''


class Cluster:
    """Slurm on hosts.

    Args:
        directory: for everything it writes; its path must be short, for the sockets in it.
        hosts: the nodes.
        accounting: keep accounts, with a database.
        job_age: how long the controller remembers a job that has ended, in seconds.

    Attributes:
        environment: variables that lead Slurm's programs to it.
    """

    def __init__(self, directory: Path, hosts: Hosts, *, accounting=False, job_age=300):
        self.directory, self._hosts, self._accounting = directory, hosts, accounting
        self._job_age = job_age
        self._started: list[subprocess.Popen] = []
        self.environment = {'SLURM_CONF': str(directory / 'slurm.conf')}

    def __enter__(self) -> 'Cluster':
        lacking = missing(self._accounting)
        assert not lacking, f'The tests of Slurm need programs that are not installed: {lacking}'
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if not exc or exc[0] is None:
            subprocess.run(
                ['scancel', '--full', '--state=RUNNING'], env=self._env(), check=False, timeout=20
            )
        # The last one started may need those before it to end.
        for process in reversed(self._started):
            tree = [process]
            try:
                tree = [*psutil.Process(process.pid).children(recursive=True), process]
            except psutil.NoSuchProcess:
                continue
            for each in tree:
                try:
                    each.terminate()
                except psutil.NoSuchProcess:
                    continue
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                # A slurmd without its controller does not leave on SIGTERM.
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
                process.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Runs one of Slurm's programs and returns what it prints."""
        done = subprocess.run(
            command, env=self._env(), capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or not done.returncode, f'{command}: {done.stdout}{done.stderr}'
        return done.stdout + ('' if check else done.stderr)

    def until(self, what, seconds: float = 60.0):
        """Waits until what() is true and returns that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.1)
        raise AssertionError(f'it never came to that: {self.run("scontrol", "show", "jobs")}')

    def _start(self) -> None:
        d, count = self.directory, self._hosts.count
        conf = _CONF + (_ACCOUNTING if self._accounting else _NO_ACCOUNTING)
        net = self._hosts.address(0).rpartition('.')[0]
        facts = {
            'd': d,
            'n': count,
            'm': min(count, 4),
            'net': net,
            'ctl': self._hosts.address(0),
            'port': 16800 + int(net.rpartition('.')[2]),  # on all interfaces of this machine
            'age': self._job_age,
            'dbd_port': _DBD_PORT,
            'db_port': _DB_PORT,
        }
        (d / 'state').mkdir()
        (d / 'slurm.conf').write_text(conf.format(**facts))
        (d / 'gres.conf').write_text(f'Name=gpu File={d}/gpu[0-3]\n')
        (d / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
        for index in range(4):
            os.mknod(d / f'gpu{index}', 0o666 | 0o020000, os.makedev(1, 3))
        (d / 'munge.key').write_bytes(os.urandom(1024))
        (d / 'munge.key').chmod(0o400)
        self._daemon(
            'munged', '--foreground', '--force', f'--socket={d}/munge.sock',
            f'--key-file={d}/munge.key', f'--pid-file={d}/munge.pid', f'--log-file={d}/munge.log',
            f'--seed-file={d}/munge.seed',
        )  # fmt: skip
        self.until((d / 'munge.sock').exists, 10)
        if self._accounting:
            self._start_accounting(facts)
        conf = str(d / 'slurm.conf')
        self._daemon('slurmctld', '-D', '-c', '-i', '-f', conf, host=0)
        for index in range(1, count + 1):
            self._daemon('slurmd', '-D', '-f', conf, '-N', f'node{index}', host=index)
        idle = ['sinfo', '-h', '-N', '-p', 'wide', '-t', 'idle', '-o', '%N']
        self.until(lambda: len(self.run(*idle, check=False).split()) == count, 30)

    def _start_accounting(self, facts: dict) -> None:
        d = self.directory
        subprocess.run(
            ['mariadb-install-db', '--no-defaults', f'--user={_owner()}', f'--datadir={d}/db',
             '--auth-root-authentication-method=normal', '--skip-test-db'],
            check=True, capture_output=True,
        )  # fmt: skip
        self._daemon(
            'mariadbd', '--no-defaults', f'--user={_owner()}', f'--datadir={d}/db',
            f'--socket={d}/db.sock', '--bind-address=127.0.0.1', f'--port={_DB_PORT}',
            '--innodb-buffer-pool-size=64M', '--innodb-lock-wait-timeout=900',
        )  # fmt: skip
        client = ['mariadb', '--no-defaults', '-S', f'{d}/db.sock', '-e']
        quiet = {'capture_output': True, 'check': False}
        self.until(lambda: not subprocess.run([*client, 'select 1'], **quiet).returncode, 30)
        subprocess.run([*client, _TABLES], check=True)
        (d / 'slurmdbd.conf').write_text(_DBD_CONF.format(**facts))
        (d / 'slurmdbd.conf').chmod(0o600)
        self._daemon('slurmdbd', '-D')
        add = ['sacctmgr', '-i', 'add']
        self.until(lambda: 'Adding' in self.run(*add, 'cluster', 'testcluster', check=False), 30)
        self.run(*add, 'account', 'test', 'Cluster=testcluster')
        self.run(*add, 'user', 'root', 'Account=test')

    def _daemon(self, *command: str, host: int | None = None) -> None:
        command = command if host is None else self._hosts.command(host, *command)
        with open(self.directory / f'{len(self._started)}.log', 'w') as log:
            self._started.append(
                subprocess.Popen(
                    command,
                    env=self._env(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_'))}
        return {**kept, **self.environment}


def _owner() -> str:
    return 'root'
