"""Which values the next trial of a sweep has: a function of the plan, the trial and those before.

Nothing is kept beside the trials themselves, so a sweep that goes on draws what it would have.
"""

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence

from launch.sweeps.book import Trial
from launch.sweeps.plan import Choice, Plan, Range
from trainer.errors import ConfigError

_DIGITS = 6  # Of a number that was drawn: enough, and good to read.


def draw(plan: Plan, number: int, trials: Sequence[Trial]) -> dict[str, str]:
    """Returns the values of a trial, as they are written in a .gin file, by parameter.

    Args:
        plan: of the sweep.
        number: of the trial, from 1 on.
        trials: that have begun.

    Raises:
        ConfigError: Optuna is asked for and not installed.
    """
    if plan.method == 'grid':
        choices = [domain.values for domain in plan.parameters.values()]
        values = next(itertools.islice(itertools.product(*choices), number - 1, None))
        return dict(zip(plan.parameters, values, strict=True))
    if plan.method == 'random':
        return {
            name: _random(domain, random.Random(f'{plan.seed}/{number}/{name}'))
            for name, domain in plan.parameters.items()
        }
    return _optuna(plan, number, trials)


def check(plan: Plan) -> None:
    """Raises ConfigError if what the method needs is not installed."""
    if plan.method == 'optuna':
        _import_optuna()


def _random(domain: Choice | Range, rng: random.Random) -> str:
    if isinstance(domain, Choice):
        return rng.choice(domain.values)
    low, high = domain.low, domain.high
    if domain.whole and not domain.logarithmic:
        return repr(rng.randint(low, high))
    if domain.whole:
        # Each whole number has the interval around it.
        value = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return repr(min(max(round(value), low), high))
    if domain.logarithmic:
        return _number(math.exp(rng.uniform(math.log(low), math.log(high))), domain)
    return _number(rng.uniform(low, high), domain)


def _number(value: float, domain: Range) -> str:
    return repr(min(max(float(f'{value:.{_DIGITS}g}'), domain.low), domain.high))


def _import_optuna():
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != 'optuna':
            raise
        raise ConfigError(
            "sweep.method = 'optuna' needs Optuna, which is not installed. Run: "
            "pip install 'phalanx[optuna]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _optuna(plan: Plan, number: int, trials: Sequence[Trial]) -> dict[str, str]:
    """Asks Optuna's tree-structured Parzen estimator, told of all trials anew.

    Its source of chance is new for each trial, so that none is drawn twice after a restart.
    """
    optuna = _import_optuna()
    made = {name: _distribution(optuna, domain) for name, domain in plan.parameters.items()}
    digest = hashlib.sha256(f'{plan.seed}/{number}'.encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], 'big'),
            # Trials that run count as bad ones, or several at once would all try the same.
            constant_liar=True,
        )
    study = optuna.create_study(
        direction='maximize' if plan.mode == 'max' else 'minimize', sampler=sampler
    )
    states = {
        'finished': optuna.trial.TrialState.COMPLETE,
        'stopped': optuna.trial.TrialState.PRUNED,
        'failed': optuna.trial.TrialState.FAIL,
    }
    for trial in trials:
        state = states.get(trial.state, optuna.trial.TrialState.RUNNING)
        value = trial.value if trial.state == 'finished' else None
        if trial.state == 'finished' and value is None:
            state = states['failed']  # Its metric was not finite.
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=_typed(plan, trial.parameters),
                distributions=made,
                intermediate_values={trial.step: trial.value}
                if trial.state == 'stopped' and trial.value is not None
                else None,
            )
        )
    asked = study.ask(made).params
    return {
        name: asked[name]
        if isinstance(domain, Choice)
        else repr(asked[name])
        if domain.whole
        else _number(asked[name], domain)
        for name, domain in plan.parameters.items()
    }


def _distribution(optuna, domain: Choice | Range):
    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(domain.values)
    if domain.whole:
        return optuna.distributions.IntDistribution(domain.low, domain.high, log=domain.logarithmic)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.logarithmic)


def _typed(plan: Plan, parameters: Mapping[str, str]) -> dict[str, str | int | float]:
    return {
        name: text
        if isinstance(plan.parameters[name], Choice)
        else int(text)
        if plan.parameters[name].whole
        else float(text)
        for name, text in parameters.items()
    }
