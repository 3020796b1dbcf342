"""The learning-rate range test: the loss at ever higher rates, and where to set the rate.

Smith, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186,
section 3.3; with a rate that grows exponentially.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from trainer import canonical, schedule
from trainer.data.batch import Data, batch_spec, learnt
from trainer.data.pipeline import train_batches
from trainer.errors import ConfigError
from trainer.groups import Group
from trainer.interval import epoch_steps
from trainer.objective import Objective, WholeStep
from trainer.preflight import check_batch_size, check_labels
from trainer.remat import rematerialise
from trainer.state import build_state
from trainer.step import TrainStep
from trainer.warm_start import WarmStart, begin_with

# A loss so many times the best one is lost, as in fast.ai's test.
_DIVERGED = 4.0
# Of the moving average of the loss; with 100 steps it looks back over some ten of them.
_KEEPS = 0.9


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What the loss did.

    Attributes:
        rates: of each step taken.
        losses: of the batch of each step, before its update.
        smoothed: their moving average, corrected for its start.
        diverged: whether the test ended because the loss had become too high, or not finite.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged: bool

    @property
    def lowest(self) -> int:
        """The step at which the smoothed loss was lowest."""
        return int(np.argmin(self.smoothed))

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate of the lowest loss; None where the loss never fell."""
        if self.smoothed[self.lowest] >= self.smoothed[0] or not self.lowest:
            return None
        return float(f'{self.rates[self.lowest] / 10:.2g}')


def range_test(
    *,
    strategy: tf.distribute.Strategy,
    model: Callable[[], keras.Model],
    optimizer: Callable[[], keras.optimizers.Optimizer],
    loss: Callable | Mapping[str, Callable],
    train_data: Data,
    batch_size: int,
    groups: Sequence[Group | Sequence[Group]] = (),
    seed: int = 0,
    precision: str = 'float32',
    accumulate: int = 1,
    canonical_shards: int | None = None,
    train_step: Callable | None = None,
    remat: Sequence[str] = (),
    jit_compile: bool = False,
    warm_start: WarmStart | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    """Trains with a rate that grows from step to step, until the loss diverges. Writes nothing.

    The rate is that of the run's own optimizer; optimizers of groups keep theirs.

    Args:
        strategy: where.
        model, optimizer, loss, train_data, batch_size, groups, seed, precision, accumulate,
            canonical_shards, train_step, remat, jit_compile, warm_start: what
            `trainer.train` is given.
        lowest, highest: the first rate and the last.
        steps: how many rates there are.

    Raises:
        ConfigError: the rates do not rise, or what `trainer.train` would refuse.
    """
    if not 0 < lowest < highest or steps < 10:
        raise ConfigError(
            f'A range test of {steps} steps from {lowest} to {highest} is none: it takes 10 steps '
            'or more, and rates above 0 that rise.'
        )
    objective, replicas = Objective(loss), strategy.num_replicas_in_sync
    if canonical_shards is not None:
        canonical.check(canonical_shards, replicas)
    check_batch_size(batch_size, canonical_shards or replicas, accumulate)
    train_data = learnt(train_data, None)
    steps_per_epoch = epoch_steps(train_data.source.num_examples, batch_size)
    growing = keras.optimizers.schedules.ExponentialDecay(lowest, steps - 1, highest / lowest)

    def with_growing_rate() -> keras.optimizers.Optimizer:
        made = optimizer()
        schedule.bind([made], steps, steps_per_epoch)  # Keras asks for the rate that it replaces.
        made.learning_rate = growing
        return made

    state = build_state(
        strategy,
        model,
        with_growing_rate,
        batch_spec(train_data)['inputs'],
        groups=groups,
        seed=seed,
        precision=precision,
    )
    schedule.bind(state.optimizers, steps, steps_per_epoch)
    rematerialise(state.model, remat)
    objective = objective if train_step is None else WholeStep(train_step)
    objective.find_names(strategy, state, batch_spec(train_data, batch_size // replicas))
    num_classes = check_labels(train_data, loss, state.output_spec)
    if warm_start is not None:
        begin_with(warm_start, state)
    step = TrainStep(
        strategy,
        state,
        objective,
        seed=seed,
        accumulate=accumulate,
        canonical_shards=canonical_shards,
        jit_compile=jit_compile,
        log_losses=True,
    )
    batches = train_batches(
        train_data,
        strategy,
        seed=seed,
        global_batch_size=batch_size,
        start_step=0,
        num_classes=num_classes,
    )
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    while len(losses) < steps and not diverged:
        totals = step.run(batches, 1)
        value = float(totals['losses'][0])
        diverged = not totals['finite_steps'] or not math.isfinite(value)
        if diverged and losses:
            break
        losses.append(value)
        average = _KEEPS * average + (1 - _KEEPS) * value
        smoothed.append(average / (1 - _KEEPS ** len(losses)))
        diverged = diverged or smoothed[-1] > _DIVERGED * min(smoothed)
    rates = lowest * (highest / lowest) ** (np.arange(len(losses)) / (steps - 1))
    return RangeTest(rates, np.array(losses), np.array(smoothed), diverged)
