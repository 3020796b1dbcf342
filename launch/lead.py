"""Brings a job to its end, on one host or several, and says how it went."""

import dataclasses
import sys
from collections.abc import Sequence

from launch import display
from launch.asked import Asked
from launch.board import write_text
from launch.gang import Gang
from launch.record import Record, Request
from launch.supervisor import Supervisor
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


def lead(job: Asked, argv: Sequence[str], hosts: Gang | None = None) -> int:
    """Supervises a job to its end and says how it went; returns its exit code.

    Args:
        job: what is asked for.
        argv: the flags it was asked with, for the record.
        hosts: where its workers run; the default is this host.
    """
    dirs = ModelDir(job.model_dir)
    request = Request(
        flags=list(argv),
        workers=job.workers,
        workers_per_host=job.workers_per_host,
        devices_per_worker=job.devices_per_worker,
        mode=job.options.mode,
        verbosity=job.options.verbosity,
        policy=dataclasses.asdict(job.policy),
        script=job.script,
    )
    code = Supervisor(
        [f'--model_dir={job.model_dir}', *job.rest],
        job.script,
        workers=job.workers,
        least=job.least,
        hosts=hosts,
        data_workers=job.data_workers,
        dirs=dirs,
        policy=job.policy,
        display=display.for_stdout(job.logs),
        record=Record(dirs, request),
    ).run()
    if code != ConfigError.exit_code:
        _tell_verdict(dirs)
    return code


def _tell_verdict(dirs: ModelDir) -> None:
    lines = []
    # The job has ended, and nothing here may make its exit code another: neither Ctrl-C, nor a
    # disk that was too full for all events.
    try:
        # Rich takes its time to import.
        from launch.account import account
        from launch.report import markdown, verdict

        result = account(dirs)
        lines = [
            *verdict(result),
            f'{result.wall:,.0f} s in {result.attempts} attempt(s), {result.goodput:.0%} of them '
            f'in steps that count; `phalanx report {dirs.path}` tells more',
        ]
        write_text(dirs.job, result.step, 'report', markdown(result))
    except (Exception, KeyboardInterrupt) as error:
        lines.append(f'no report: {error or type(error).__name__}')
    for line in lines:
        display.write(f'phalanx: {line}\n', sys.stderr)
