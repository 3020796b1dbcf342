"""How the learning rate goes over a run, in parts whose lengths may be given as parts of it."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import keras
import tensorflow as tf

from trainer.errors import ConfigError, nearest
from trainer.interval import parse_length

# Which parameters mean something to which shape, beside `peak`, `warmup` and `start`.
_SHAPES = {
    'constant': (),
    'cosine': ('end',),
    'linear': ('end',),
    'polynomial': ('end', 'power'),
    'step': ('boundaries', 'factor'),
    'wsd': ('end', 'decay'),
    'one_cycle': ('end',),
}
_DEFAULTS = {'end': 0.0, 'power': 2.0, 'factor': 0.1, 'decay': '10%'}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly to a peak and then goes as its shape says.

    With p from 0 at the end of the warm-up to 1 at the end of the run, the rate is the peak times

        constant:    1
        cosine:      end + (1 - end) (1 + cos(pi p)) / 2       https://arxiv.org/abs/1608.03983
        linear:      end + (1 - end) (1 - p)
        polynomial:  end + (1 - end) (1 - p) ** power
        step:        factor ** (number of `boundaries` that lie behind)
        wsd:         1, and over the last part, `decay`, linearly to end (warm-up, stable, decay:
                     https://arxiv.org/abs/2404.06395)
        one_cycle:   back to `start`, in as many steps as the warm-up, then linearly to end
                     (https://arxiv.org/abs/1708.07120)

    Lengths are steps (500), epochs ('2 epochs') or parts of the run ('5%'). They are known once
    `bind` has told how long the run is.

    Args:
        shape: one of the above.
        peak: the highest rate.
        warmup: length of the warm-up; 0 begins at the peak.
        start: the rate at step 0, as a fraction of the peak, where there is a warm-up.
        end: the rate at the end of the run, as a fraction of the peak; 0 by default.
        power: of 'polynomial'; 2 by default.
        boundaries: of 'step': lengths from the start of the run, rising.
        factor: of 'step', at each boundary; 0.1 by default.
        decay: of 'wsd': length of the decay; '10%' by default, as in the paper.

    Raises:
        ConfigError: an unknown shape, a parameter that the shape does not have, or a value out
            of range.
    """

    def __init__(
        self,
        shape: str,
        peak: float,
        warmup: int | str = 0,
        start: float = 0.0,
        end: float | None = None,
        power: float | None = None,
        boundaries: Sequence[int | str] | None = None,
        factor: float | None = None,
        decay: int | str | None = None,
    ):
        if shape not in _SHAPES:
            raise ConfigError(
                f'Schedule.shape is {shape!r}; it must be one of {", ".join(_SHAPES)}.'
                f'{nearest(str(shape), _SHAPES)}'
            )
        self._shape, self._peak, self._warmup, self._start = shape, peak, warmup, start
        given = {
            'end': end, 'power': power, 'boundaries': boundaries, 'factor': factor, 'decay': decay
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and name not in _SHAPES[shape]:
                raise ConfigError(
                    f'Schedule.{name} is {value!r}, but a schedule of shape {shape!r} has no '
                    f'{name}. Remove it.'
                )
            setattr(self, f'_{name}', _DEFAULTS.get(name) if value is None else value)
        if shape == 'step' and not boundaries:
            raise ConfigError("Schedule.boundaries is not set. Give lengths: ['50%', '75%'].")
        fractions = {'start': (start, 1), 'end': (self._end, 1), 'factor': (self._factor, 1)}
        for name, (value, most) in {**fractions, 'peak': (peak, math.inf)}.items():
            if not 0 <= value <= most:
                limits = 'a fraction of the peak, 0 to 1' if most == 1 else '0 or more'
                raise ConfigError(f'Schedule.{name} is {value}; it must be {limits}.')
        self._config = {
            'shape': shape, 'peak': peak, 'warmup': warmup, 'start': start, **given
        }  # fmt: skip
        self._last_step: int | None = None

    def bind(self, last_step: int, steps_per_epoch: int | Fraction | None) -> None:
        """Tells how long things are; before that, there is no rate.

        Args:
            last_step: length of the run in steps.
            steps_per_epoch: from `trainer.interval.epoch_steps`.

        Raises:
            ConfigError: a length is none, or the parts are longer than the run.
        """

        def steps(length: int | str) -> int:
            return parse_length(length, last_step, steps_per_epoch)

        self._warmup_steps, self._decay_steps = steps(self._warmup), steps(self._decay)
        self._boundary_steps = [steps(each) for each in self._boundaries or ()]
        needed = {
            'wsd': self._warmup_steps + self._decay_steps,
            'one_cycle': 2 * self._warmup_steps,
        }
        if (taken := needed.get(self._shape, self._warmup_steps)) > last_step:
            parts = {'wsd': 'warmup and decay', 'one_cycle': 'twice the warmup'}
            raise ConfigError(
                f'{parts.get(self._shape, "warmup").capitalize()} of the schedule takes {taken:,} '
                f'steps, but the run has {last_step:,}. Give it as a part of the run, such as '
                "Schedule.warmup = '5%'."
            )
        if sorted({*self._boundary_steps}) != self._boundary_steps:
            raise ConfigError(
                f'Schedule.boundaries {list(self._boundaries)} are the steps '
                f'{self._boundary_steps}; they must rise.'
            )
        self._last_step = last_step

    def __call__(self, step) -> tf.Tensor:
        """Returns the rate of a step, a float32 scalar.

        Raises:
            RuntimeError: it has not been told how long the run is.
        """
        if self._last_step is None:
            raise RuntimeError(
                'The schedule does not know how long the run is. Call bind(last_step, '
                'steps_per_epoch) first; trainer.train does.'
            )
        step = tf.cast(step, tf.float32)
        warm, total = float(self._warmup_steps), float(self._last_step)
        after = tf.clip_by_value((step - warm) / max(total - warm, 1.0), 0.0, 1.0)
        value = getattr(self, f'_after_{self._shape}')(step, after)
        if warm:
            rising = self._start + (1 - self._start) * step / warm
            value = tf.where(step < warm, rising, value)
        return tf.cast(self._peak, tf.float32) * value

    def _after_constant(self, step, after):
        return tf.ones_like(after)

    def _after_cosine(self, step, after):
        return self._to_end(0.5 * (1 + tf.cos(math.pi * after)))

    def _after_linear(self, step, after):
        return self._to_end(1 - after)

    def _after_polynomial(self, step, after):
        return self._to_end((1 - after) ** self._power)

    def _after_step(self, step, after):
        behind = tf.reduce_sum(
            tf.cast(step >= tf.constant(self._boundary_steps, tf.float32), tf.float32)
        )
        return tf.cast(self._factor, tf.float32) ** behind

    def _after_wsd(self, step, after):
        left = (self._last_step - step) / max(self._decay_steps, 1)
        return self._to_end(tf.clip_by_value(left, 0.0, 1.0))

    def _after_one_cycle(self, step, after):
        warm = self._warmup_steps
        last = max(self._last_step - 2 * warm, 1)
        falling = 1 - (1 - self._start) * (step - warm) / max(warm, 1)
        left = tf.clip_by_value((self._last_step - step) / last, 0.0, 1.0)
        return tf.where(step < 2.0 * warm, falling, self._end + (self._start - self._end) * left)

    def _to_end(self, left):
        """From 1 to `end`, as `left` goes from 1 to 0."""
        return self._end + (1 - self._end) * left

    def get_config(self) -> dict:
        """Returns the arguments it was made with."""
        return dict(self._config)


def bind(
    optimizers: Iterable[keras.optimizers.Optimizer],
    last_step: int,
    steps_per_epoch: int | Fraction | None,
) -> None:
    """Tells the schedules of optimizers how long the run is; see `Schedule.bind`."""
    for optimizer in optimizers:
        rate = getattr(optimizer, '_learning_rate', None)
        if isinstance(rate, Schedule):
            rate.bind(last_step, steps_per_epoch)


def scaled_rate(rate: float, batch_size: int, per: int = 256, rule: str = 'linear') -> float:
    """Returns a learning rate that goes with the global batch.

    The linear rule is that of https://arxiv.org/abs/1706.02677, which also warms up. The square
    root keeps the variance of a step (https://arxiv.org/abs/1404.5997, section 5).

    Args:
        rate: what is right for a global batch of `per`.
        batch_size: global, in examples; in gin, %BATCH_SIZE.
        per: the batch for which `rate` was chosen.
        rule: 'linear': times batch_size / per; 'sqrt': times the square root of that.

    Raises:
        ConfigError: an unknown rule, or a size below 1.
    """
    rules = {'linear': 1.0, 'sqrt': 0.5}
    if rule not in rules:
        raise ConfigError(
            f'scaled_rate.rule is {rule!r}; it must be one of {", ".join(rules)}.'
            f'{nearest(str(rule), rules)}'
        )
    if batch_size < 1 or per < 1:
        raise ConfigError(
            f'scaled_rate scales from a batch of {per} to one of {batch_size}; both must be 1 or '
            'more.'
        )
    return rate * (batch_size / per) ** rules[rule]
