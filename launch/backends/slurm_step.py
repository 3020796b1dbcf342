"""What the batch script of a Slurm job becomes: it runs the tasks, and decides what follows.

Slurm gives a job that is preempted, or at its time limit, some seconds to end, and counts it as
failed if it ends in them. So this asks for the requeue itself, before it ends.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.backends import Unreachable
from launch.backends.slurm_queue import jobs
from trainer.model_dir import ModelDir

_FINISHED, _FAILED, _MISTAKE, _STOPPED = 0, 1, 2, 75
# Of srun itself, where it could start nothing.
_SRUN_ERROR = 200
_LONGEST_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2
# A signal is lost on tasks that srun has not started yet.
_LAUNCH_SECONDS = 5.0
# What tasks that were asked to end may take beside their grace time.
_END_SECONDS = 30.0
# After which Slurm has not ended this, as it was asked to.
_LONGEST_END_SECONDS = 600.0


class Step:
    """One step of the job after the other, and the signals to it."""

    def __init__(self, command: Sequence[str], grace_seconds: float):
        """Prepares it; the batch script is told with SIGUSR1 that the tasks shall save and end.

        SIGTERM is left to Slurm, which sends it to the tasks as well.
        """
        self._command, self._grace_seconds = command, grace_seconds
        self.asked = False  # to save and end
        signal.signal(signal.SIGUSR1, self._ask)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Runs the tasks, and returns the exit code of srun: the highest one of theirs."""
        if self.asked:
            return _STOPPED
        nodes = os.environ['SLURM_JOB_NUM_NODES']
        program, *rest = self._command
        srun = subprocess.Popen(
            [program, f'--nodes={nodes}', f'--ntasks={nodes}', *rest],
            env={**os.environ, 'SLURM_EXIT_ERROR': str(_SRUN_ERROR)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Slurm's signals to the batch script are not for it.
        )
        deaf_until, end = time.monotonic() + _LAUNCH_SECONDS, math.inf
        while srun.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self.asked and end == math.inf and time.monotonic() > deaf_until:
                srun.send_signal(signal.SIGUSR1)  # which passes it on to all tasks
                end = time.monotonic() + self._grace_seconds + _END_SECONDS
            if time.monotonic() > end:
                _say('the tasks have not ended in time, and are killed')
                srun.terminate()
                end += _END_SECONDS
        return srun.returncode if srun.returncode >= 0 else 128 - srun.returncode

    def _ask(self, *_: object) -> None:
        self.asked = True


class Failures:
    """Counts the ends of a job without a new checkpoint, over its requeues.

    The count is kept in a file in model_dir; it begins again with another job.
    """

    def __init__(self, dirs: ModelDir, job: str):
        self._dirs, self._job = dirs, job
        self._path = dirs.logs / 'slurm.json'

    def add(self) -> int:
        """Adds one, and returns how many in a row there are."""
        count, step = 0, -1
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(self._path.read_text(encoding='utf-8'))
            if kept['job'] == self._job:
                count, step = int(kept['failures']), int(kept['step'])
        newest = step
        with contextlib.suppress(OSError):
            newest = self._dirs.newest_step()
        count = count + 1 if newest == step else 1
        kept = {'job': self._job, 'failures': count, 'step': newest}
        aside = Path(f'{self._path}.tmp')
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(kept), encoding='utf-8')
            os.replace(aside, self._path)
        return count


def main(argv: Sequence[str] | None = None) -> int:
    """Brings the job to its end, or to its requeue, and returns the exit code of the script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, command = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
    parser = argparse.ArgumentParser(prog='slurm_step', allow_abbrev=False)
    parser.add_argument('--model_dir', required=True)
    parser.add_argument('--max_restarts', type=int, required=True)
    parser.add_argument('--grace_seconds', type=float, required=True)
    arguments = parser.parse_args(own)
    step = Step(command, arguments.grace_seconds)
    job_id = os.environ['SLURM_JOB_ID']
    if array := os.environ.get('SLURM_ARRAY_JOB_ID'):
        # After others of the array were cancelled scancel does not know the other id any more.
        job_id = f'{array}_{os.environ["SLURM_ARRAY_TASK_ID"]}'
    failures = Failures(ModelDir(arguments.model_dir), job_id)
    while True:
        begun = time.monotonic()
        code = step.run()
        if code in (_FINISHED, _MISTAKE):
            return code
        try:
            record = next(iter(jobs(job_id)), None)
        except Unreachable as error:
            _say(f'{error} Without it this job cannot be requeued: submit it again to go on.')
            record = None
        if code == _FAILED and not step.asked and not (record and record.preempted):
            return code
        if record is None:
            return _STOPPED
        if record.word != 'RUNNING' and not record.reason.startswith('TimeLimit'):
            return _STOPPED  # Slurm ends it.
        if step.asked and not record.requeue:
            _say('the job was cancelled')
            return _end_by(['scancel', job_id])
        if record.preempted:
            _say('the job is preempted, and requeued')
            return _end_by(['scontrol', 'requeue', job_id])
        count = failures.add()
        if count > arguments.max_restarts:
            _say(
                f'giving up: {count} times in a row the tasks ended without a new checkpoint, the '
                f'last time with exit code {code}'
            )
            return _FAILED
        so_far = f'({count} of {arguments.max_restarts} without a new checkpoint)'
        if step.asked or code == _STOPPED:
            _say(f'the tasks were stopped; the job is requeued {so_far}')
            return _end_by(['scontrol', 'requeue', job_id])
        wait = min(_LONGEST_WAIT_SECONDS, 2.0**count) - (time.monotonic() - begun)
        _say(f'the tasks were killed (exit code {code}) and are started again {so_far}')
        time.sleep(max(0.0, wait))


def _end_by(command: Sequence[str]) -> int:
    """Has Slurm end this job, and waits for that."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f'{" ".join(command)}: {done.stderr.strip()}. Submit the job again to go on.')
        return _STOPPED
    time.sleep(_LONGEST_END_SECONDS)
    return _STOPPED


def _say(text: str) -> None:
    print(f'phalanx: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    sys.exit(main())
