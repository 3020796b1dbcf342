"""How long a job stands still when one of its workers is killed, and how much of that is ours.

Real jobs of two workers run under `phalanx run`; a random one of them is killed with SIGKILL while
steps are taken and a checkpoint newer than the last kill is there. The time from the kill to the
end of the next step is split by the ledger and by the chief's record of phases. Most of it is the
start of two processes with TensorFlow, which no job is spared: each job's own first start, where
there is no checkpoint, is measured the same way, and stands beside it. Ours is what a restart takes
longer than such a start, and what can be told apart directly: until the launcher has noticed, until
it has started new processes, and while they restore.
"""

import contextlib
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pairs

# isort: split
import psutil

from launch.ledger import json_lines

FLAGS = [
    '--mode=train',
    '--gin_file=runs/digits.gin',
    '--gin.STEPS=1000000',
    '--gin.DEVICES=1',
    '--gin.AUGMENT=@random_shift',
    '--gin.random_shift.max_pixels=1',
    '--gin.train.save_every=200',
    '--gin.train.eval_every=None',
]
DEADLINE_SECONDS = 180.0
TARGET_SECONDS = 2.0
NOTICED, STARTED, RESTORED = 'until it is noticed', 'until processes are started', 'restoring'
# Each phase with the one that ends it.
PHASES = {
    'Python, TensorFlow, the meeting': 'building',
    'building': 'restoring',
    RESTORED: 'compiling',
    'compiling, and the first step': 'stepping',
}
OURS = (NOTICED, STARTED, RESTORED)


class Job:
    """A job of two workers under the launcher."""

    def __init__(self, model_dir: Path):
        self._model_dir = model_dir
        command = ['-m', 'launch', 'run', '--workers=2', f'--model_dir={model_dir}', *FLAGS]
        environment = {**os.environ, 'PYTHONPATH': str(pairs.CHECKOUT)}
        environment.pop('TF_CONFIG', None)
        with open(f'{model_dir}.out', 'w') as output:
            self._process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=output, stderr=output
            )

    def kill_one(self) -> float:
        """Kills a random worker some time after a new checkpoint; returns when."""
        before = self._newest()
        self._until(lambda: self._newest() > before)
        time.sleep(random.uniform(0, 1))
        victim = random.choice(psutil.Process(self._process.pid).children())
        killed = time.time()
        victim.kill()
        return killed

    def start(self, attempt: int) -> dict[str, float]:
        """Waits for the first step of an attempt; returns the seconds of each part of its start."""
        path = self._model_dir / 'logs' / f'attempt-{attempt}' / 'worker-0.phases.jsonl'
        self._until(lambda: any('seconds' in line for line in json_lines(path)))
        first: dict[str, float] = {}
        for line in json_lines(path):
            first.setdefault(line['phase'], line['time'])
        marks = [self._events('attempt')[attempt - 1]['time']]
        marks += [first[phase] for phase in PHASES.values()]
        spans = [end - begin for begin, end in itertools.pairwise(marks)]
        return dict(zip(PHASES, spans, strict=True))

    def recover(self, attempt: int, killed: float) -> dict[str, float]:
        """The same for an attempt after a kill, and the seconds before its start."""
        start = self.start(attempt)
        noticed = self._events('exit')[-1]['time']
        if any(each['seconds'] for each in self._events('wait')):
            raise RuntimeError('the launcher has backed off, though there was a new checkpoint')
        again = self._events('attempt')[-1]['time']
        return {NOTICED: noticed - killed, STARTED: again - noticed, **start}

    def end(self) -> None:
        """Ends it with all its processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = psutil.Process(self._process.pid).children()
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
            for process in [*workers, self._process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()

    def _events(self, name: str) -> list[dict]:
        events = json_lines(self._model_dir / 'ledger.jsonl')
        return [each for each in events if each['event'] == name]

    def _newest(self) -> int:
        found = (self._model_dir / 'checkpoints').glob('step-*/manifest.json')
        return max((int(path.parent.name[5:]) for path in found), default=0)

    def _until(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while not what():
            if time.monotonic() > end or self._process.poll() is not None:
                output = Path(f'{self._model_dir}.out').read_text()
                raise RuntimeError(f'the job did not come that far:\n{output[-3000:]}')
            time.sleep(0.05)


def measure(jobs: int, kills: int) -> Iterator[tuple[dict[str, float], list[dict[str, float]]]]:
    """Yields, of each job, the parts of its first start and of each recovery."""
    for _ in range(jobs):
        with tempfile.TemporaryDirectory() as directory:
            job = Job(Path(directory) / 'run')
            try:
                fresh = job.start(1)
                yield fresh, [job.recover(n + 2, job.kill_one()) for n in range(kills)]
            finally:
                job.end()


def rows(
    recoveries: Sequence[Mapping[str, float]], starts: Sequence[Mapping[str, float]]
) -> Iterator[tuple[str, Sequence[float], Sequence[float] | None]]:
    """Yields what was measured, seconds of each recovery, and seconds of each first start."""
    for name in recoveries[0]:
        alone = None if name in (NOTICED, STARTED) else [each[name] for each in starts]
        yield name, [each[name] for each in recoveries], alone
    totals = [sum(each.values()) for each in recoveries]
    unavoidable = [sum(each.values()) for each in starts]
    yield 'all, to the end of a step', totals, unavoidable
    usual = statistics.median(unavoidable)
    yield 'ours: beyond the median start', [total - usual for total in totals], None
    direct = [sum(each[name] for name in OURS) for each in recoveries]
    yield 'ours: noticed, started, restored', direct, None


def main() -> None:
    options = pairs.arguments(__doc__, jobs=5, kills=4)
    print(f'\nFrom SIGKILL to the next step\n{pairs.machine()}\n', flush=True)
    starts, recoveries = [], []
    for fresh, killed in measure(options.jobs, options.kills):
        starts.append(fresh)
        recoveries += killed
    heads = ['seconds', *(f'after a kill, {each}' for each in ('mean', 'median', 'worst'))]
    table = [[*heads, 'first start, mean', 'median', 'worst', 'target']]
    for name, ours, alone in rows(recoveries, starts):
        target = ''
        if name.startswith('ours'):
            held = statistics.mean(ours) < TARGET_SECONDS
            target = f'mean < {TARGET_SECONDS:g}: {"holds" if held else "missed"}'
        table.append([name, *_three(ours), *(_three(alone) if alone else ['', '', '']), target])
    if options.markdown:
        table.insert(1, ['---'] * len(heads) + ['---'] * 4)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        if options.markdown:
            print('|', ' | '.join(row), '|')
        else:
            print('  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print(f'{len(recoveries)} kills, {len(starts)} first starts')


def _three(values: Sequence[float]) -> list[str]:
    found = (statistics.mean(values), statistics.median(values), max(values))
    return [f'{each:.2f}' for each in found]


if __name__ == '__main__':
    main()
