"""The file of a sweep: which parameters, which values, in which way, and by which metric."""

import ast
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from trainer import gin_files
from trainer.errors import ConfigError, nearest
from trainer.gin_files import MACRO, Binding, Reference

METHODS = ('grid', 'random', 'optuna')
MODES = ('max', 'min')
STOPS = ('median',)
# Kind of a range -> whether its values are whole numbers, whether it is even in the logarithm.
RANGES = {
    'uniform': (False, False),
    'log_uniform': (False, True),
    'int': (True, False),
    'log_int': (True, True),
}
_NAME = re.compile(r'[\w.]+(/[\w.]+)*')
_SELECTOR = 'sweep'


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, each as it is written in a .gin file."""

    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that are all right only if all are."""
        return self.values


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        kind: one of `RANGES`.
        low, high: the least and the greatest.
    """

    kind: str
    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers."""
        return RANGES[self.kind][0]

    @property
    def logarithmic(self) -> bool:
        """Whether each factor is as likely as any other."""
        return RANGES[self.kind][1]

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that are all right only if all are."""
        return tuple(dict.fromkeys((repr(self.low), repr(self.high))))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a file of a sweep asks for; its fields are the parameters of `sweep` there.

    Attributes:
        parameters: gin's name of a parameter or a macro -> where its values are from.
        metric: what trials are compared by, as the end of a run shows it: 'eval/accuracy'.
        mode: whether the best is its 'max' or its 'min'.
        method: 'grid', all combinations; 'random'; or 'optuna'.
        trials: how many; a grid has as many as there are combinations.
        seed: of what is drawn.
        stop: 'median' ends trials that do worse than others did; None ends none.
        stop_from: the step before which none is ended.
        where: the line of the parameters, 'FILE:LINE'; not for the file to set.
    """

    parameters: Mapping[str, Choice | Range]
    metric: str
    mode: str
    method: str = 'random'
    trials: int = 0
    seed: int = 0
    stop: str | None = None
    stop_from: int = 0
    where: str = ''

    def describe(self) -> dict[str, Any]:
        """Returns all that must stay as it is while a sweep goes on, for JSON."""
        described = dataclasses.asdict(self)
        del described['trials'], described['where']  # There may be more; the file may move.
        for name, domain in self.parameters.items():
            values = domain.values if isinstance(domain, Choice) else dataclasses.astuple(domain)
            described['parameters'][name] = list(values)
        return described

    def better(self, one: float, other: float) -> bool:
        """Whether a value of the metric is better than another; any is better than NaN."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one > other if self.mode == 'max' else one < other


def read(file: str, search_path=()) -> Plan:
    """Reads the file of a sweep.

    Args:
        file: its name, looked up like that of a configuration.
        search_path: further directories.

    Raises:
        ConfigError: it is not there, or something in it is wrong; which says where.
    """
    script = gin_files.read([file], (), search_path)
    known = [field.name for field in dataclasses.fields(Plan) if field.name != 'where']
    found: dict[str, Binding] = {}
    for binding in script.bindings:
        if binding.selector != _SELECTOR or binding.scope or binding.parameter not in known:
            left = binding.scope if binding.selector == MACRO else binding.parameter
            raise ConfigError(
                f'{binding.where}: {binding.name} is no setting of a sweep. They are sweep.'
                f'{", sweep.".join(known)}.{nearest(left, known)} What is the same in all trials '
                'belongs into the file of --gin_file.'
            )
        found[binding.parameter] = binding
    for name in ('parameters', 'metric', 'mode'):
        if name not in found:
            raise ConfigError(f'{file}: sweep.{name} is not set.{_EXAMPLES[name]}')
    settings = {name: _checked(name, binding) for name, binding in found.items()}
    plan = Plan(**settings, where=found['parameters'].where)
    return _complete(plan, found)


_EXAMPLES = {
    'parameters': " Write: sweep.parameters = {'LEARNING_RATE': ('log_uniform', 1e-4, 1e-1)}.",
    'metric': " Write: sweep.metric = 'eval/accuracy', or another that the end of a run shows.",
    'mode': " Write: sweep.mode = 'max', or 'min' for a loss.",
}
_ONE_OF = {'method': METHODS, 'mode': MODES, 'stop': (*STOPS, None)}
_LEAST = {'trials': 1, 'seed': 0, 'stop_from': 0}


def _checked(name: str, binding: Binding) -> Any:
    value, left = binding.value, f'{binding.where}: sweep.{name} = {binding.value!r}'
    if name == 'parameters':
        return _parameters(binding)
    if name in _ONE_OF and value not in _ONE_OF[name]:
        texts = [each for each in _ONE_OF[name] if each is not None]
        raise ConfigError(f'{left} is none of {", ".join(texts)}.{nearest(str(value), texts)}')
    if name in _LEAST and (type(value) is not int or value < _LEAST[name]):
        raise ConfigError(f'{left}; it must be a whole number from {_LEAST[name]} on.')
    if name == 'metric' and not (isinstance(value, str) and re.fullmatch('(eval|train)/.+', value)):
        raise ConfigError(f"{left}; it must be one as 'eval/accuracy' or 'train/loss'.")
    return value


def _complete(plan: Plan, found: Mapping[str, Binding]) -> Plan:
    """Checks what must fit together, and counts the trials of a grid."""
    if plan.stop and not plan.metric.startswith('eval/'):
        raise ConfigError(
            f'{found["stop"].where}: sweep.stop goes by evaluations, and sweep.metric = '
            f'{plan.metric!r} is none. Name one that begins with eval/.'
        )
    if plan.method != 'grid':
        if not plan.trials:
            raise ConfigError(
                f'sweep.trials is not set: how many trials shall {plan.method} have? Write: '
                'sweep.trials = 20.'
            )
        return plan
    if 'trials' in found:
        raise ConfigError(
            f'{found["trials"].where}: a grid has as many trials as there are combinations. '
            "Remove sweep.trials, or set sweep.method = 'random'."
        )
    for name, domain in plan.parameters.items():
        if isinstance(domain, Range):
            raise ConfigError(
                f'{found["parameters"].where}: a grid needs values to choose from, but {name!r} '
                "has a range. Write a list of values, or set sweep.method = 'random'."
            )
    return dataclasses.replace(
        plan, trials=math.prod(len(domain.values) for domain in plan.parameters.values())
    )


def _parameters(binding: Binding) -> dict[str, Choice | Range]:
    value = binding.value
    if not isinstance(value, dict) or not value:
        raise ConfigError(
            f'{binding.where}: sweep.parameters is {value!r}, not a dict of one parameter or more.'
            + _EXAMPLES['parameters']
        )
    found = {}
    for name, domain in value.items():
        where = f'{binding.where}: sweep.parameters[{name!r}]'
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where} is no name of a parameter. Write one as 'mlp.units', or a macro as "
                "'LEARNING_RATE'."
            )
        if name in ('MODEL_DIR', 'train.model_dir'):
            raise ConfigError(f'{where}: each trial has a directory of its own. Leave it out.')
        found[name] = _domain(domain, where)
    return found


def _domain(value: Any, where: str) -> Choice | Range:
    if isinstance(value, list):
        texts = tuple(_gin(each) for each in value)
        if not texts:
            raise ConfigError(f'{where} is an empty list. Give the values to choose from.')
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise ConfigError(f'{where} holds {twice} twice. Remove one.')
        return Choice(texts)
    mend = f"Write a list of values, [16, 32, 64], or a range, ('{next(iter(RANGES))}', 0.0, 0.5)."
    if not isinstance(value, tuple) or len(value) != 3:
        raise ConfigError(f'{where} = {value!r} is neither a list nor a range. {mend}')
    kind, low, high = value
    if kind not in RANGES:
        raise ConfigError(
            f'{where} is a range of the kind {kind!r}, which is none of {", ".join(RANGES)}.'
            f'{nearest(str(kind), RANGES)}'
        )
    whole, logarithmic = RANGES[kind]
    for end in (low, high):
        fitting = type(end) is int or (not whole and type(end) is float and math.isfinite(end))
        if not fitting:
            raise ConfigError(
                f'{where}: {end!r} is no end of a range {kind!r}, which wants '
                f'{"whole numbers" if whole else "numbers"}.'
            )
    if low >= high:
        raise ConfigError(f'{where}: the range from {low!r} to {high!r} is empty.')
    if logarithmic and low <= 0:
        raise ConfigError(f'{where}: {low!r} has no logarithm. Begin above 0.')
    return Range(kind, low, high) if whole else Range(kind, float(low), float(high))


def _gin(value: Any) -> str:
    """Writes a value as gin reads it."""
    if isinstance(value, Reference):
        return repr(value)
    if isinstance(value, list):
        return f'[{", ".join(map(_gin, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(_gin, value))}{"," if len(value) == 1 else ""})'
    if isinstance(value, dict):
        return '{' + ', '.join(f'{_gin(k)}: {_gin(v)}' for k, v in value.items()) + '}'
    return repr(value)


def plain(text: str) -> bool | int | float | str:
    """Returns what a value in gin is for a table: a number or truth value, or else its text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (bool, int, float, str)) else text
