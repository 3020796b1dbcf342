"""One host's part in a job of several hosts: the leader and its agent, or an agent alone.

`python -m launch.task --scheduler=NAME [FLAG ...]` is what a scheduler starts on each host, with
the flags of `phalanx run`; it finds out by itself which host it is.

Exit codes: 0 finished; 2 a mistake; 75 stopped after saving, or hosts are missing: to be started
again; 1 failed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from launch import asked, display
from launch.agent import Agent, Unmet
from launch.asked import Asked
from launch.gang import Gang
from launch.lead import lead
from launch.local import check_gpus
from launch.place import SCHEDULERS, Place, of_scheduler
from trainer.errors import ConfigError, Preempted, WriteError, nearest
from trainer.model_dir import ModelDir


def perform(job: Asked, place: Place, argv: Sequence[str], *, tee: bool = False) -> int:
    """Performs the part of one host, returns its exit code.

    Args:
        job: what is asked for, the same on all hosts.
        place: which of them this is.
        argv: the flags it was asked with, for the record.
        tee: whether what the workers of this host print goes to stdout.

    Raises:
        ConfigError: a mistake in flags or configuration, other ones than the leader's, or too few
            GPUs on this host.
        WriteError: the disk is full.
    """
    if job.data_workers:
        raise ConfigError(
            '--data_workers is for jobs of one host: those of several make their batches '
            'themselves. Leave it out.'
        )
    check_gpus(job.workers_per_host)
    with tempfile.TemporaryDirectory(prefix='phalanx-') as aside:
        config = Path(aside) / 'config.json'
        job.script.save(config)
        agent = functools.partial(
            Agent,
            digest=_digest(job, place),
            flags=[f'--model_dir={job.model_dir}', *job.rest, f'--gin_script={config}'],
            dirs=ModelDir(job.model_dir),
            workers_per_host=job.workers_per_host,
            seconds=job.policy.meeting_seconds,
            tee=tee and place.rank > 0,
        )
        if place.rank == 0:
            return _lead(job, place, argv, agent)
        try:
            return agent(place).run()
        except Unmet as error:
            print(f'phalanx: {error}', file=sys.stderr)
            return Preempted.exit_code


def _lead(
    job: Asked, place: Place, argv: Sequence[str], make_agent: Callable[[Place], Agent]
) -> int:
    gang = Gang(
        place,
        _digest(job, place),
        workers_per_host=job.workers_per_host,
        seconds=job.policy.meeting_seconds,
        tell=lambda text: display.write(f'phalanx: {text}\n', sys.stderr),
    )
    code = 1
    with contextlib.ExitStack() as stack, gang:
        # It calls this very process, whoever else listens at the ports of the job.
        agent = make_agent(dataclasses.replace(place, leader='127.0.0.1', ports=(gang.port,)))
        # In a thread that lives as long: workers die with the one that has started them.
        thread = threading.Thread(
            target=agent.run, kwargs={'handles_signals': False}, name='agent', daemon=True
        )
        thread.start()
        stack.callback(thread.join)
        try:
            code = lead(job, argv, gang)
        except (ConfigError, Preempted) as error:
            code = error.exit_code
            raise
        except KeyboardInterrupt:
            code = Preempted.exit_code
            raise
        finally:
            gang.end(code)
            agent.leave()
    return code


def _digest(job: Asked, place: Place) -> str:
    """Returns what tells a task of this job from one that was started otherwise."""
    alike = {
        'config': job.script.text,
        'hosts': place.hosts,
        'workers': [job.least, job.workers, job.workers_per_host],
        'rest': job.rest,
        'model_dir': job.model_dir,
    }
    return hashlib.sha256(json.dumps(alike).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the task of a scheduler; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        values = flags.FlagValues()
        values.set_gnu_getopt(True)
        asked.define(values)
        flags.DEFINE_string('scheduler', '', 'Which one has started this.', flag_values=values)
        flags.DEFINE_boolean('tee', False, 'Print what the workers do.', flag_values=values)
        job = asked.read(values, argv)
        if job is None:
            return 0
        if values.scheduler not in SCHEDULERS:
            raise ConfigError(
                f'--scheduler={values.scheduler} is none of {", ".join(SCHEDULERS)}.'
                f'{nearest(values.scheduler, SCHEDULERS)}'
            )
        place = of_scheduler(values.scheduler)
        each = values.workers_per_host or 1
        if place.hosts * each < job.least:
            raise ConfigError(
                f'--workers={values.workers} with --workers_per_host={each} needs '
                f'{math.ceil(job.least / each)} hosts at least, but {values.scheduler} has given '
                f'{place.hosts}.'
            )
        # An elastic job may have got fewer hosts than it can use, or more.
        workers = min(job.workers, place.hosts * each)
        job = dataclasses.replace(job, workers=workers, workers_per_host=each)
        return perform(job, place, argv, tee=values.tee)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, Preempted, WriteError) as error:
        print(f'phalanx: {getattr(error, "message", error)}', file=sys.stderr)
        return error.exit_code


if __name__ == '__main__':
    sys.exit(main())
