"""`phalanx VERB`: the program that runs jobs."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import jobs, verb_flags
from launch.backends import Unreachable
from launch.replay import replay
from launch.rerun import rerun
from launch.run import run
from launch.submit import submit, submit_help
from launch.sweeps.book import Book, is_sweep
from trainer.errors import ConfigError, Preempted, WriteError, nearest
from trainer.model_dir import ModelDir

VERBS = (
    'run',
    'check',
    'sweep',
    'submit',
    'status',
    'logs',
    'cancel',
    'list',
    'top',
    'report',
    'rerun',
    'replay',
    'prepare',
    'inspect',
    'tune',
)

# These take the handle of a submitted job, too.
_BY_HANDLE = ('status', 'logs', 'cancel')
# What these take besides the directory.
_NEEDED = {'rerun': ' --model_dir=NEW', 'replay': ' --step=N'}

_USAGE = """\
usage: phalanx run [--workers=N] [--devices_per_worker=M] --gin_file=FILE --model_dir=DIR [FLAG ...]

Starts the workers of one job on this host and brings it to its end: when a worker dies or hangs,
all are started again from the newest checkpoint. Ctrl-C or SIGTERM saves and ends (exit code 75);
the same command goes on. All other flags are those of `python -m trainer` (see its --help) and go
to every worker.

  --workers: processes that train together, each with its own devices; default 1. LEAST-N lets the
    job go on with fewer.
  --devices_per_worker: GPUs of each worker or, without GPUs, CPU devices to make.
  --data_workers: more processes, that read, augment and preprocess for the workers; default 0.
  --max_restarts: restarts in a row without a new checkpoint; default 3.
  --grace_seconds: how long workers have to save after a signal; default 60.
  --patience_seconds: how long a worker may make no progress before it counts as stuck; more where
    steps have been seen to take longer, and 5 to 30 times that in all other phases. Default 60.
  --elastic: after two failures in a row without a new checkpoint, go on with the next smaller
    number of workers that can share the batch equally, and with all again when they come back.
  --logs: whose output is shown, chief, all or none; default chief. Each has its log file anyway.
  --tensorboard: start TensorBoard on this host's loopback, and end it with the job.

  --hosts=A,B,C --rank=I: the job is one of several hosts. Run the same command on each of them,
    with its own rank, from 0 on. Host 0 leads; DIR is on a file system that all share.
  --workers_per_host: how many workers each host has; default: the workers shared equally.
  --meeting_seconds: how long hosts wait for each other; default 300.

phalanx check --workers=N [FLAG ...]    whether `phalanx run` with these flags would go well: one
                                        step of one replica, in one process that leaves nothing

phalanx sweep --sweep_file=FILE [--parallel=N] --gin_file=FILE --model_dir=DIR [FLAG ...]
                                        runs with other values of some parameters, each in
                                        DIR/trial-N as by `phalanx run`; the same command goes on

  --sweep_file: which parameters, which values, by which metric; see docs/sweeps.md.
  --parallel: how many trials at a time, which share cores and GPUs; default as many as the GPUs
    suffice for, one without GPUs.

phalanx submit --scheduler=NAME --workers=N [FLAG ...]
                                        hands the job to slurm, kubernetes or ray, prints its handle

  --dry_run: print what would be handed over, and do nothing.
  --check: rehearse one step here first, as `phalanx check` does.
  --name, --time_limit=12h, --env=NAME=VALUE (may be repeated), --workdir, --python
  --cpus_per_worker, --memory_mb_per_worker, --gpus_per_worker, --workers_per_host (default 1)
  `phalanx submit --scheduler=NAME --help` lists the flags for that scheduler.

A JOB below is the handle of a submitted job or a model_dir.

phalanx status JOB                      how it stands
phalanx logs JOB [--worker=I] [--follow]  what it, or a worker in the newest attempt, has said
phalanx cancel JOB                      has it save and end
phalanx list [--all]                    the jobs that were submitted from here
phalanx top DIR [--once] [--tensorboard]  all jobs below a directory: step, ETA, pace, goodput

phalanx report DIR [--png=FILE]         where the time of all attempts went, also as a chart; of a
                                        sweep its trials, the best first
phalanx rerun DIR --model_dir=NEW       runs a finished job again from its record, and compares
phalanx replay DIR --step=N [--pdb]     takes step N again, eagerly, and shows what is in it

phalanx prepare DIR --gin_file=FILE     writes the data of a configuration to files of records,
                                        with a description, for `runs/prepared.gin`
phalanx inspect DIR                     what is in a prepared directory, or, with --gin_file=FILE
                                        in place of DIR, in any data

  --format: array_record, the default, or tfrecord.
  --shards or --shard_mb: how many files each split has, or about how large they are; default 200.
  --processes: how many write at a time; default one for each core.
  --on_bad_record: stop at a damaged record, the default, or skip it.
  --verify: read everything, and compare checksums; exit code 1 if something is damaged.
  --png=FILE, --tensorboard=DIR: some of the images with their labels.

phalanx tune batch [FLAG ...]           the largest BATCH_SIZE that fits, and how fast each one is;
                                        flags are those of `phalanx run`, and --largest=N
phalanx tune lr [FLAG ...]              the loss at ever higher learning rates, in this process;
                                        --lowest=1e-6, --highest=1, --png=FILE
  --tune_steps: steps of a try (default 20) or of the test (100).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code of the program."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ('-h', '--help', 'help'):
            print(_USAGE)
            return 0
        verb, *rest = argv
        if verb not in VERBS:
            raise ConfigError(
                f'{verb!r} is not a verb of phalanx ({", ".join(VERBS)}).{nearest(verb, VERBS)}'
            )
        if {'-h', '--help'} & set(rest):
            print(submit_help(rest) if verb == 'submit' else _USAGE)
            return 0
        if verb in ('run', 'check'):
            return run(rest, check=verb == 'check')
        if verb == 'sweep':
            from launch.sweep import sweep

            return sweep(rest)
        if verb == 'submit':
            return submit(rest)
        if verb == 'tune':
            from launch.tune import tune

            return tune(rest)
        if verb in ('prepare', 'inspect'):
            return _data(verb, rest)
        return _look(verb, rest)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, Preempted, WriteError) as error:
        # Gin appends to a message where it passes through.
        print(f'phalanx: {getattr(error, "message", error)}', file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Who reads has seen enough. Python would try again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, Unreachable) as error:
        print(f'phalanx: {error}', file=sys.stderr)
        return 1


def _data(verb: str, argv: list[str]) -> int:
    # Rich takes its time to import, and so does numpy.
    if verb == 'prepare':
        from launch.prepare import prepare

        return prepare(argv)
    from launch.inspect import inspect

    return inspect(argv)


def _look(verb: str, argv: list[str]) -> int:
    own = flags.FlagValues()
    own.set_gnu_getopt(True)
    if verb == 'logs':
        flags.DEFINE_integer('worker', None, 'Which worker.', 0, flag_values=own)
        flags.DEFINE_boolean('follow', False, 'Go on.', short_name='f', flag_values=own)
    elif verb == 'report':
        flags.DEFINE_string('png', None, 'A file for the chart.', flag_values=own)
    elif verb == 'list':
        flags.DEFINE_boolean('all', False, 'Old ones too.', flag_values=own)
    elif verb == 'top':
        flags.DEFINE_boolean('once', False, 'Once.', flag_values=own)
        flags.DEFINE_boolean('tensorboard', False, 'Show curves.', flag_values=own)
    elif verb == 'rerun':
        flags.DEFINE_string('model_dir', None, 'Where to.', flag_values=own)
    elif verb == 'replay':
        flags.DEFINE_integer('step', None, 'Which step.', 1, flag_values=own)
        flags.DEFINE_boolean('pdb', False, 'Under the debugger.', flag_values=own)
    more = _NEEDED.get(verb, '')
    rest = verb_flags.parse(own, verb, argv)
    if verb == 'list' and not rest:
        jobs.listing(everything=own.all)
        return 0
    if len(rest) != 1:
        what = {'list': '', 'top': ' DIR, which holds the model_dirs of jobs'}.get(
            verb, f' {"JOB" if verb in _BY_HANDLE else "DIR"}{more}, its model_dir'
        )
        raise ConfigError(f'Of which job? Write: phalanx {verb}{what}.')
    if verb == 'status':
        print(jobs.status(rest[0]))
        return 0
    if verb == 'logs':
        jobs.logs(rest[0], own.worker, follow=own.follow)
        return 0
    if verb == 'cancel':
        jobs.cancel(rest[0])
        return 0
    if verb == 'top':
        # Rich takes its time to import.
        from launch.top import top

        top(rest[0], once=own.once, curves=own.tensorboard)
        return 0
    dirs = ModelDir(rest[0])
    if verb == 'report':
        _report(dirs, own.png)
    elif verb == 'rerun':
        if own.model_dir is None:
            raise ConfigError(f'Where shall it run again? Write: phalanx rerun {rest[0]}{more}.')
        return rerun(dirs, ModelDir(own.model_dir), run)
    else:
        if own.step is None:
            raise ConfigError(f'Which step? Write: phalanx replay {rest[0]}{more}.')
        return replay(dirs, own.step, debug=own.pdb)
    return 0


def _report(dirs: ModelDir, png: str | None) -> None:
    # Rich takes its time to import.
    if is_sweep(dirs.path):
        from launch.sweeps.report import save_png, show

        book = Book(dirs.path)
        book.load()
        show(book)
        if png:
            save_png(book, Path(png))
        return
    from launch.report import save_png, show

    show(dirs)
    if png:
        save_png(dirs, Path(png))


if __name__ == '__main__':
    sys.exit(main())
