"""Weights to begin with, out of another model's: a partial restore by path, and a report of it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from trainer import weight_files
from trainer.errors import ConfigError
from trainer.groups import matches, nearest_paths
from trainer.proof import state_sha256
from trainer.state import State

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Which weights a new run begins with; a run that is resumed has its own.

    A variable gets the array of the same path or, where there is none, of the same path without
    its first part, the name of the model. Weights and statistics are taken; optimizers begin anew.

    Attributes:
        path: see `trainer.weight_files.read`.
        include: patterns of paths of this model's variables; only they are restored.
        exclude: patterns; these are not.
        rename: pattern of names in the file -> what they are here, each `*` standing for the same
            in both: {'backbone/*': 'net/encoder/*'}. The first that matches is used.
        averages: whether to take the averages that an optimizer with `use_ema` has kept in a
            checkpoint of ours, in place of the weights.
    """

    path: str
    include: str | Sequence[str] = '*'
    exclude: str | Sequence[str] = ()
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    averages: bool = False

    def __post_init__(self):
        for old, new in self.rename.items():
            if old.count('*') != new.count('*'):
                raise ConfigError(
                    f'WarmStart.rename makes {new!r} of {old!r}; both must have as many *, which '
                    'stand for the same.'
                )


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every variable and of every array.

    Attributes:
        kind: what the file is, in words.
        note: how names were found, '' where the file has them.
        restored: paths of variables that were assigned.
        missing: paths that the file has not.
        misfits: paths whose arrays have another shape, with both shapes.
        left_out: paths that patterns leave out.
        unused: names in the file that nothing took.
        sha256: of what was restored.
    """

    kind: str
    note: str
    restored: list[str]
    missing: list[str]
    misfits: list[str]
    left_out: list[str]
    unused: list[str]
    sha256: str

    def __str__(self) -> str:
        variables = len(self.restored) + len(self.missing) + len(self.misfits) + len(self.left_out)
        rows = {
            'restored': [f'{len(self.restored)} of {variables} variables'],
            'not in it': self.missing,
            'other shape': self.misfits,
            'left out': self.left_out,
            'not used': self.unused,
        }
        lines = [f'  {name + ":":<13}{_some(values)}' for name, values in rows.items() if values]
        matched = f', matched {self.note}' if self.note else ''
        return '\n'.join([f'{self.kind}{matched}', *lines])

    def record(self) -> dict[str, Any]:
        """Returns what the manifests of the run say of it."""
        counts = {name: len(getattr(self, name)) for name in ('restored', 'missing', 'misfits')}
        return {'kind': self.kind, **counts, 'sha256': self.sha256}


def begin_with(start: WarmStart, state: State) -> dict[str, Any]:
    """Assigns what fits of the weights in a file to a new state, and logs a report.

    Every worker reads the file; that all have read the same is left to the caller.

    Args:
        start: what is taken from where.
        state: at step 0.

    Returns:
        A record of it, JSON-compatible.

    Raises:
        ConfigError: the file cannot be read, a pattern matches nothing, or nothing fits.
    """
    report = restore(start, state)
    logging.info('warm start from %s: %s', start.path, report)
    return {'path': start.path, **report.record()}


def restore(start: WarmStart, state: State) -> Report:
    """Does what `begin_with` does, without a word."""
    of_model = {id(v.value) for v in state.model.variables}
    variables = {p: v for p, v in state.variables.items() if id(v) in of_model}
    weights = weight_files.read(start.path, state.model, averages=start.averages)
    arrays = _renamed(weights.arrays, start)
    for name in ('include', 'exclude'):
        patterns = getattr(start, name)
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            if not any(matches(path, pattern) for path in variables):
                raise ConfigError(
                    f'WarmStart.{name} {pattern!r} matches no variable of the model. '
                    f'{nearest_paths(pattern, list(variables))}'
                )
    wanted = [p for p in variables if matches(p, start.include) and not matches(p, start.exclude)]
    sources = _sources(wanted, arrays)
    fitting, misfits = {}, []
    for path, source in sources.items():
        array, variable = arrays[source], variables[path]
        if array.shape == tuple(variable.shape):
            fitting[path] = array.astype(variable.dtype.as_numpy_dtype)
        else:
            misfits.append(f'{path} {list(array.shape)}, here {variable.shape.as_list()}')
    if not fitting:
        raise ConfigError(
            f'Nothing in {start.path!r} fits this model. It holds {_some(list(arrays))}; the model '
            f'has {_some(wanted)}.'
            + (f' Of another shape: {_some(misfits)}.' if misfits else '')
            + " WarmStart.rename = {'old/*': 'new/*'} tells which are the same."
        )
    for path, array in fitting.items():
        variables[path].assign(array)
    return Report(
        kind=weights.kind,
        note=weights.note,
        restored=list(fitting),
        missing=[path for path in wanted if path not in sources],
        misfits=misfits,
        left_out=[path for path in variables if path not in wanted],
        unused=[name for name in arrays if name not in sources.values()],
        sha256=state_sha256(fitting),
    )


def _sources(wanted: Sequence[str], arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Path -> name of the array it takes, where there is one."""
    found = {path: path for path in wanted if path in arrays}
    # One model may have another name than the other, or none.
    rest: dict[str, list[str]] = {}
    for name in arrays.keys() - found.values():
        for tail in {name, name.partition('/')[2]} - {''}:
            rest.setdefault(tail, []).append(name)
    for path in wanted:
        names = rest.get(path.partition('/')[2], ())
        if path not in found and len(names) == 1:
            found[path] = names[0]
    return found


def _renamed(arrays: Mapping[str, np.ndarray], start: WarmStart) -> dict[str, np.ndarray]:
    rules = [
        (old, re.compile('(.*)'.join(map(re.escape, old.split('*')))), new)
        for old, new in start.rename.items()
    ]
    found, used = {}, set()
    for name, array in arrays.items():
        for old, pattern, new in rules:
            if match := pattern.fullmatch(name):
                used.add(old)
                parts = iter(match.groups())
                name = re.sub(r'\*', lambda _, parts=parts: next(parts), new)
                break
        if name in found:
            raise ConfigError(f'WarmStart.rename gives two weights the name {name!r}.')
        found[name] = array
    for old in start.rename.keys() - used:
        raise ConfigError(
            f'WarmStart.rename {old!r} matches nothing in {start.path!r}. '
            f'{nearest_paths(old, list(arrays))}'
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more
