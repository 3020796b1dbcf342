"""The flags of one task: what to do and which configuration; read without TensorFlow."""

import dataclasses
import re
from collections.abc import Sequence

from absl import flags, logging

from trainer.errors import ConfigError, nearest

MODES = ('train', 'evaluate', 'train_and_evaluate', 'export', 'serve_data')

_USAGE = """\
usage: python -m trainer --gin_file=runs/digits.gin --model_dir=DIR [FLAG ...]

Runs one task of a job. Settings are given in .gin files and, on the command line, as
--gin.NAME=VALUE, where NAME is a macro (BATCH_SIZE) or a parameter (train.log_every). A VALUE is
a Python literal, an @reference or a %macro. A text needs quotes inside the shell's:
--gin.PRECISION='"bfloat16"'
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        gin_files: names of .gin files, in order.
        gin_bindings: lines of gin that follow the files; the last one is --model_dir's.
        gin_search_path: directories to look for .gin files in.
        gin_script: a file with what another process has read, in place of `gin_files`.
        mode: one of `MODES`.
        listen: 'host:port' where a data worker listens.
        dry_run: check everything, train nothing.
        check_workers: the same for a job of so many workers, in this process alone.
        verbosity: absl's: -1 warnings, 0 news, 1 details, with tracebacks of mistakes.
    """

    gin_files: tuple[str, ...]
    gin_bindings: tuple[str, ...]
    gin_search_path: tuple[str, ...]
    gin_script: str | None
    mode: str
    listen: str
    dry_run: bool
    check_workers: int | None
    verbosity: int


def parse(argv: Sequence[str], others: Sequence[str] = ()) -> Options | None:
    """Parses the command line, without the program's name.

    Args:
        argv: the arguments.
        others: names of the caller's own flags, which a misspelt one may have meant.

    Returns:
        The options; None when help was asked for, which is then printed.

    Raises:
        ConfigError: a flag is unknown, lacks its value or has a wrong one.
    """
    values = _define()
    if {'-h', '-help', '--help', '--helpshort', '--helpfull'} & set(argv):
        print(_USAGE, *_help(values), sep='\n')
        return None
    try:
        rest = values(['trainer', *rewrite_gin_flags(argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        mend = nearest(error.flagname, [*_names(values), *others])
        raise ConfigError(
            f'Unknown flag --{error.flagname}.{mend} Settings of the configuration '
            'are given as --gin.NAME=VALUE; --help lists the flags.'
        ) from None
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. --help lists the flags.') from None
    logging.set_verbosity(values.verbosity)  # Here, for a mistake that is told below.
    if rest:
        raise ConfigError(f'{rest[0]!r} is not a flag. A file is given as --gin_file={rest[0]}.')
    if values.mode not in MODES:
        raise ConfigError(
            f'--mode={values.mode} is none of {", ".join(MODES)}.{nearest(values.mode, MODES)}'
        )
    bindings = list(values.gin_bindings)
    if values.model_dir is not None:
        bindings.append(f'MODEL_DIR = {values.model_dir!r}')
    return Options(
        tuple(values.gin_file),
        tuple(bindings),
        tuple(values.gin_search_path),
        values.gin_script,
        values.mode,
        values.listen,
        values.dry_run,
        values.check_workers,
        values.verbosity,
    )


def reason(error: flags.Error) -> str:
    """Returns what is wrong with a flag's value, without a full stop."""
    return re.sub('invalid literal for int.*', 'a whole number is wanted', str(error))


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """Turns each `--gin.NAME=VALUE` or `--gin.NAME VALUE` into `--gin_bindings=NAME=VALUE`.

    Raises:
        ConfigError: the last one has no value.
    """
    rewritten, rest = [], iter(argv)
    for argument in rest:
        if argument == '--':
            return [*rewritten, argument, *rest]
        match = re.fullmatch(r'--?gin\.([^=]*)(=.*)?', argument, re.DOTALL)
        if not match:
            rewritten.append(argument)
            continue
        name, value = match.groups()
        if value is None:
            value = next(rest, None)
            if value is None or value.startswith('--'):
                raise ConfigError(f'{argument} has no value. Write {argument}=VALUE.')
            value = f'={value}'
        rewritten.append(f'--gin_bindings={name}{value}')
    return rewritten


def _define() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    new = {'flag_values': values}
    flags.DEFINE_multi_string(
        'gin_file',
        [],
        'A .gin file, by its path or by its name in the shipped configs; may be repeated, later '
        'files override earlier ones.',
        **new,
    )
    flags.DEFINE_multi_string(
        'gin_bindings',
        [],
        'A line of gin after all files; may be repeated. --gin.NAME=VALUE is short for '
        "--gin_bindings='NAME = VALUE'.",
        **new,
    )
    flags.DEFINE_multi_string(
        'gin_search_path',
        [],
        'A directory to look for .gin files in, before the shipped configs; may be repeated.',
        **new,
    )
    flags.DEFINE_string(
        'gin_script',
        None,
        'A configuration as `phalanx run` has read it, in place of files.',
        **new,
    )
    flags.DEFINE_string('model_dir', None, 'Sets MODEL_DIR: where everything is written.', **new)
    flags.DEFINE_string('mode', 'train_and_evaluate', f'One of {", ".join(MODES)}.', **new)
    flags.DEFINE_string(
        'listen',
        '127.0.0.1:0',
        'Where a data worker (--mode=serve_data) listens, host:port. Whoever can reach it can read '
        'the data.',
        **new,
    )
    flags.DEFINE_boolean('dry_run', False, 'Check everything, train nothing, write nothing.', **new)
    flags.DEFINE_integer(
        'check_workers',
        None,
        'Like --dry_run for a job of so many workers, but in this process alone: the part of one '
        'replica.',
        1,
        **new,
    )
    flags.DEFINE_integer(
        'verbosity',
        logging.INFO,
        '-1: warnings; 0: news; 1: details, and tracebacks of mistakes.',
        short_name='v',
        **new,
    )
    return values


def _names(values: flags.FlagValues) -> list[str]:
    return sorted({flag.name for flag in values.get_flags_for_module(flags.__name__)} | set(values))


def _help(values: flags.FlagValues) -> list[str]:
    return [f'  --{name}: {values[name].help}' for name in values if len(name) > 1]
