"""`phalanx VERB`: the program that runs jobs."""

import sys
from collections.abc import Sequence

from absl import flags

from launch import local
from trainer.errors import ConfigError, nearest
from trainer.flags import parse, reason

VERBS = ('run',)

_USAGE = """\
usage: phalanx run [--workers=N] [--devices_per_worker=M] --gin_file=FILE --model_dir=DIR [FLAG ...]

Starts the workers of one job on this host and ends when they have ended. All other flags are
those of `python -m trainer` (see its --help) and go to every worker.

  --workers: processes that train together, each with its own devices; default 1.
  --devices_per_worker: GPUs of each worker or, without GPUs, CPU devices to make.
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
        return _run(rest)
    except ConfigError as error:
        print(f'phalanx: {error.message}', file=sys.stderr)
        return error.exit_code


def _run(argv: list[str]) -> int:
    own = flags.FlagValues()
    flags.DEFINE_integer('workers', 1, 'Processes that train together.', 1, flag_values=own)
    flags.DEFINE_integer('devices_per_worker', None, 'Devices of each.', 1, flag_values=own)
    try:
        rest = own(['phalanx', *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. phalanx --help lists the flags.') from None
    if '--help' in rest or '-h' in rest:
        print(_USAGE)
        return 0
    # A mistake is told once, here, and not by every worker.
    parse(rest, others=('workers', 'devices_per_worker'))
    if own.devices_per_worker is not None:
        rest.append(f'--gin.strategy.devices_per_worker={own.devices_per_worker}')
    return local.run(rest, workers=own.workers)


if __name__ == '__main__':
    sys.exit(main())
