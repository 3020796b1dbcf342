"""What a user can ask of Slurm, and the flags for it."""

import dataclasses
import shlex
from pathlib import Path

from absl import flags

from trainer.errors import ConfigError, nearest
from trainer.flags import rewrite_gin_flags

_GPUS_BY = ('gres', 'gpus-per-node')
_CONTAINER_BY = ('pyxis', 'apptainer')
# Options that are passed on as they are.
OF_SBATCH = {
    'partition': 'Partition of the job.',
    'account': 'Account that it is charged to.',
    'qos': 'Quality of service.',
    'reservation': 'Reservation whose hosts it takes.',
    'constraint': 'Features that its hosts must have.',
    'nodelist': 'Hosts that must be among its own. A job waits for one that is down.',
    'exclude': 'Hosts that must not be.',
}


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of Slurm, beside what every job asks for. None leaves it to the cluster.

    Attributes:
        partition, account, qos, constraint, nodelist, exclude, reservation: as sbatch has them.
        exclusive: whether the job has its hosts for itself.
        gpus_by: 'gres' or 'gpus-per-node', the option by which GPUs are asked for.
        gpu_type: which ones, in the words of the cluster.
        sbatch: more options of sbatch, each as it stands after '#SBATCH'.
        sweep: flags for one element of a sweep each; element I runs in model_dir/I.
        sweep_at_once: how many elements run at a time, at most.
        container: the image that the tasks run in.
        container_by: 'pyxis' or 'apptainer', which runs it.
        container_mounts: what it sees beside model_dir and the working directory: PATH or
            OUTSIDE:INSIDE.
        container_python: the interpreter in it.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    gpus_by: str = 'gres'
    gpu_type: str | None = None
    sbatch: tuple[str, ...] = ()
    sweep: tuple[tuple[str, ...], ...] = ()
    sweep_at_once: int | None = None
    container: str | None = None
    container_by: str = 'pyxis'
    container_mounts: tuple[str, ...] = ()
    container_python: str = 'python3'

    def __post_init__(self):
        for flag, value, known in (
            ('gpus_by', self.gpus_by, _GPUS_BY),
            ('container_by', self.container_by, _CONTAINER_BY),
        ):
            if value not in known:
                raise ConfigError(
                    f'--{flag}={value} is none of {", ".join(known)}.{nearest(value, known)}'
                )
        for line in self.sbatch:
            if not line.startswith('-'):
                raise ConfigError(
                    f'--sbatch={line} is no option of sbatch. Write it as sbatch has it, such as '
                    '--sbatch=--mail-type=END.'
                )


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `SlurmOptions`."""
    new = {'flag_values': values}
    for name, what in OF_SBATCH.items():
        flags.DEFINE_string(name, None, f'{what} As --{name} of sbatch.', **new)
    flags.DEFINE_boolean('exclusive', False, 'Share no host with other jobs.', **new)
    flags.DEFINE_string(
        'gpus_by', 'gres', f'How GPUs are asked for: by --{" or by --".join(_GPUS_BY)}.', **new
    )
    flags.DEFINE_string('gpu_type', None, 'Type of the GPUs, as the cluster calls it.', **new)
    flags.DEFINE_multi_string(
        'sbatch', [], 'An option of sbatch, such as --mail-type=END; may be repeated.', **new
    )
    flags.DEFINE_string(
        'sweep',
        None,
        'A file with --gin.NAME=VALUE flags in each line: one job array, in which line I is run in '
        'model_dir/I, from 0.',
        **new,
    )
    flags.DEFINE_integer('sweep_at_once', None, 'How many of them run at a time.', 1, **new)
    flags.DEFINE_string('container', None, 'Image that the tasks run in.', **new)
    flags.DEFINE_string(
        'container_by', 'pyxis', f'What runs it: {" or ".join(_CONTAINER_BY)}.', **new
    )
    flags.DEFINE_multi_string(
        'container_mounts',
        [],
        'What the container sees beside model_dir and the working directory, PATH or '
        'OUTSIDE:INSIDE; may be repeated.',
        **new,
    )
    flags.DEFINE_string('container_python', 'python3', 'Interpreter in the container.', **new)


def from_flags(values: flags.FlagValues) -> SlurmOptions:
    """Returns the options that the flags say.

    Raises:
        ConfigError: a flag has a wrong value, or the file of a sweep cannot be read.
    """
    given = {field.name: values[field.name].value for field in dataclasses.fields(SlurmOptions)}
    given['sweep'] = _read_sweep(values.sweep) if values.sweep else ()
    given['sbatch'] = tuple(values.sbatch)
    given['container_mounts'] = tuple(values.container_mounts)
    return SlurmOptions(**given)


def _read_sweep(path: str) -> tuple[tuple[str, ...], ...]:
    elements = []
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'--sweep={path} cannot be read: {error}') from None
    for number, line in enumerate(lines, 1):
        try:
            given = rewrite_gin_flags(shlex.split(line, comments=True))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f'{path}:{number}: {error}: {line}') from None
        for argument in given:
            if not argument.startswith('--gin_bindings='):
                raise ConfigError(
                    f'{path}:{number}: {argument} is not of the form --gin.NAME=VALUE. All else is '
                    'the same for all elements of a sweep, and given on the command line.'
                )
        if given:
            elements.append(tuple(given))
    if not elements:
        raise ConfigError(f'--sweep={path} holds no lines such as --gin.LEARNING_RATE=0.1')
    return tuple(elements)
