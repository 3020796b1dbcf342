"""Jobs of two hosts over bad networks: far away, lossy, narrow, and cut for a while or for good.

`pytest -s` prints how fast they train. The figures in docs/clusters/networks.md are from there.
"""

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time

import pytest

from tests.cluster.hosts import Hosts, needs_root
from tests.cluster.router import Link, Network
from tests.processes import environment

pytestmark = [pytest.mark.cluster, needs_root]

# 300 kB of gradients a step.
MODEL = ['--gin.cnn.filters=64', '--gin.cnn.units=128']
SMALL = ['--gin.cnn.filters=2', '--gin.cnn.units=4']
FLAGS = [
    '--gin_file=runs/digits.gin',
    '--gin.DEVICES=1',
    '--gin.train.sample_log=True',
    '--mode=train',
]
SECONDS = 240
# Each in turns with the undisturbed link, which is the measure of it.
LINKS = {
    'delay 25 ms': Link(delay_seconds=0.025),
    'loss 1 %': Link(loss=0.01),
    '100 Mbit/s': Link(bytes_per_second=12.5e6),
}
TURNS, TURN_SECONDS = 3, 5.0


@pytest.fixture(scope='module')
def hosts():
    with Hosts(2, prefix='pxw', net='10.83.5') as hosts:
        yield hosts


@pytest.fixture
def network(hosts):
    with Network(hosts, net='10.83.6') as network:
        yield network


class Job:
    """A task on each host, the leader on the first."""

    def __init__(self, hosts, network, model_dir, *flags):
        self.model_dir = model_dir
        addresses = ','.join(network.address(index) for index in (1, 2))
        self._hosts, self._flags = hosts, [*FLAGS, *flags, f'--hosts={addresses}']
        self.tasks = [self._start(rank) for rank in range(2)]

    def _start(self, rank):
        command = [sys.executable, '-m', 'launch', 'run', f'--model_dir={self.model_dir}']
        with open(self._log(rank), 'a') as log:
            return subprocess.Popen(
                self._hosts.command(rank + 1, *command, *self._flags, f'--rank={rank}'),
                env=environment(TF_NUM_INTRAOP_THREADS='1'),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, rank):
        return self.model_dir.with_suffix(f'.{rank}.log')

    def start_again(self):
        self.tasks = [self._start(rank) for rank in range(2)]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for task in self.tasks:
            task.kill()
            task.wait()

    def output(self):
        return ''.join(self._log(rank).read_text() for rank in range(2))

    def stop(self):
        """Has the job save and end; returns the exit codes."""
        self.tasks[0].terminate()
        return self.codes()

    def codes(self):
        return [task.wait(SECONDS) for task in self.tasks]

    def steps(self):
        """The steps that the chief has done, each with its time, in all attempts."""
        lines = []
        for path in sorted(self.model_dir.glob('logs/attempt-*/worker-0.phases.jsonl')):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return [(each['time'], each['step']) for each in lines if 'step' in each]

    def reach(self, step):
        end = time.monotonic() + SECONDS
        while not any(done >= step for _, done in self.steps()):
            assert time.monotonic() < end, self.output()[-3000:]
            assert self.tasks[0].poll() is None, self.output()[-3000:]
            time.sleep(0.1)

    def ledger(self, event):
        lines = (self.model_dir / 'ledger.jsonl').read_text().splitlines()
        return [each for each in map(json.loads, lines) if each['event'] == event]

    def bits(self, step):
        manifest = self.model_dir / 'checkpoints' / f'step-{step:08}' / 'manifest.json'
        return json.loads(manifest.read_text())['state_sha256']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A function: number of steps -> the digest of the job on one host."""

    def run(steps):
        model_dir = tmp_path_factory.mktemp('alone') / 'run'
        given = [*FLAGS, *SMALL, f'--gin.STEPS={steps}', f'--model_dir={model_dir}']
        subprocess.run(
            [sys.executable, '-m', 'launch', 'run', '--workers=2', *given],
            env=environment(TF_NUM_INTRAOP_THREADS='1'),
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
        manifest = model_dir / 'checkpoints' / f'step-{steps:08}' / 'manifest.json'
        return json.loads(manifest.read_text())['state_sha256']

    return run


def pace(job):
    """Steps a second from now on, as soon as that can be told."""
    # The call that is under way belongs to another link, and the next one is as long as that was
    # fast.
    begin = len(job.steps()) + 2
    end = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < end, job.output()[-3000:]
        time.sleep(0.1)
        steps = job.steps()[begin - 1 :]
        if len(steps) < 4:
            continue
        (first, before), (last, after) = steps[0], steps[-1]
        if last - first >= TURN_SECONDS:
            return (after - before) / (last - first)


def test_training_goes_on_over_far_lossy_and_narrow_links(hosts, network, tmp_path):
    given = [*MODEL, '--gin.STEPS=1000000', '--gin.train.save_every=1000000']
    paces = {name: [] for name in LINKS}
    with Job(hosts, network, tmp_path / 'run', *given) as job:
        job.reach(100)
        for _ in range(TURNS):
            for name, link in LINKS.items():
                network.set(Link())
                undisturbed = pace(job)
                network.set(link)
                paces[name].append((undisturbed, pace(job)))
        network.set(Link())
        assert job.stop() == [75, 75], job.output()[-3000:]
        assert len(job.ledger('attempt')) == 1
        assert not job.ledger('stuck')
        assert not job.ledger('lost')
    for name, pairs in paces.items():
        ratios = [slow / fast for fast, slow in pairs]
        print(
            f'\n{name}: {statistics.median(fast for fast, _ in pairs):.1f} steps/s without, '
            f'{statistics.median(slow for _, slow in pairs):.1f} with; ratio '
            f'{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})'
        )
        assert min(ratios) > 0.01


def test_a_link_that_is_cut_for_three_seconds_costs_three_seconds(
    hosts, network, undisturbed, tmp_path
):
    with Job(hosts, network, tmp_path / 'run', *SMALL, '--gin.STEPS=600') as job:
        job.reach(50)
        network.set(Link(cut=(2,)))
        time.sleep(3.0)
        network.set(Link())
        assert job.codes() == [0, 0], job.output()[-3000:]
        steps = job.steps()
        pause = max(after - before for (before, _), (after, _) in itertools.pairwise(steps))
        print(f'\ncut for 3 s: the longest pause was {pause:.1f} s')
        assert len(job.ledger('attempt')) == 1
        assert job.bits(600) == undisturbed(600)


def test_a_host_that_is_cut_off_for_good_is_named_and_the_job_goes_on_later(
    hosts, network, undisturbed, tmp_path
):
    given = [*SMALL, '--gin.STEPS=600', '--gin.train.save_every=20', '--meeting_seconds=15']
    with Job(hosts, network, tmp_path / 'run', *given) as job:
        job.reach(50)
        network.set(Link(cut=(2,)))
        begun = time.monotonic()
        assert job.codes() == [75, 75], job.output()[-3000:]
        print(f'\ncut for good: both tasks had ended after {time.monotonic() - begun:.0f} s')
        assert f'host 1 ({network.address(2)})' in job.output()
        network.set(Link())
        job.start_again()
        assert job.codes() == [0, 0], job.output()[-3000:]
        assert job.bits(600) == undisturbed(600)
