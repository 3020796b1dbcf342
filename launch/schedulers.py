"""Which schedulers there are, by their names and by the handles of their jobs."""

import importlib
from types import ModuleType

from launch.backends import Backend
from launch.known import Submitted
from trainer.errors import ConfigError, nearest

# Scheduler: its module in launch.backends, its class there, and the scheme of its handles.
_MODULES = {
    'slurm': ('slurm', 'Slurm', 'slurm'),
    'kubernetes': ('kubernetes', 'Kubernetes', 'k8s'),
    'ray': ('ray', 'Ray', 'ray'),
}
NAMES = tuple(_MODULES)


def module(name: str) -> ModuleType:
    """Returns the module of a scheduler, with `define_flags`, `from_flags` and its class.

    Raises:
        ConfigError: there is no such scheduler.
    """
    if name not in _MODULES:
        raise ConfigError(
            f'--scheduler={name} is none of {", ".join(NAMES)}.{nearest(name, NAMES)}'
        )
    return importlib.import_module(f'launch.backends.{_MODULES[name][0]}')


def backend(name: str, options: object = None) -> Backend:
    """Returns a scheduler, with what its `from_flags` has made or with its defaults."""
    return getattr(module(name), _MODULES[name][1])(options)


def of(submitted: Submitted) -> Backend:
    """Returns the scheduler that has taken a job.

    Raises:
        ConfigError: its handle is of none.
    """
    for name, (_, _, scheme) in _MODULES.items():
        if submitted.scheme == scheme:
            return backend(name)
    schemes = ', '.join(f'{scheme}://' for _, _, scheme in _MODULES.values())
    raise ConfigError(f'{submitted.handle!r} is no handle of a job: they begin with {schemes}.')
