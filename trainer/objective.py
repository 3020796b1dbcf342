"""What is minimised: one loss, a loss for each output, or losses that the user computes.

All of them become named losses with one value an example, which can be weighted, summed over
replicas and divided once by the weight of the global batch.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.errors import ConfigError, nearest
from trainer.state import State
from trainer.sums import part_of, per_example_loss

# The name of a loss that has none of its own.
ONLY = 'loss'
Losses = dict[str, tuple[tf.Tensor, tf.Tensor | None]]


class Found(NamedTuple):
    """What a model and a batch give.

    Attributes:
        losses: name -> (losses, float32 [batch, ...]; the mask of its elements, or None).
        outputs: what metrics compare with the labels; None if there is nothing.
    """

    losses: Losses
    outputs: Any


class Objective:
    """Computes the losses of a batch.

    Args:
        loss: one of
            - a `keras.losses.Loss`, or a function (labels, outputs) -> losses;
            - a dict of these, output -> loss, for a model whose outputs are a dict;
            - a function (model, batch, training) -> losses, or (losses, outputs), where `batch`
              has 'inputs' and, as far as the data have them, 'labels' and 'weights', and losses
              are a dict of tensors, or one tensor, with one value an example.

    Raises:
        ConfigError: a Keras loss was given uncalled.
    """

    def __init__(self, loss: Callable | Mapping[str, Callable]):
        for each in loss.values() if isinstance(loss, Mapping) else [loss]:
            _check(each)
        self.loss = loss
        self._is_whole = _takes_model(loss)
        self.names = list(loss) if isinstance(loss, Mapping) else [ONLY]

    def find_names(self, strategy: tf.distribute.Strategy, state: State, spec: dict) -> None:
        """Finds out the names of losses that only the user's function knows; all names, once.

        Args:
            strategy: the one `state` was built under.
            state: the model.
            spec: of a replica's batch, 'inputs' and 'labels'.

        Raises:
            ConfigError: the losses are not of the promised kind, or are for outputs that are not.
        """
        if isinstance(self.loss, Mapping):
            self._check_outputs(state.output_spec)
        if not self._is_whole:
            return

        def replica(batch):
            model = state.model
            variables = (model.trainable_variables, state.moving, state.seeds)
            values = ([tf.convert_to_tensor(v.value) for v in each] for each in variables)
            self.names = []
            found, _, _ = state.call(lambda: self(model, batch, training=True), *values)
            self.names = sorted(found.losses)

        trace = tf.function(lambda batch: strategy.run(replica, args=(batch,)), autograph=False)
        trace.get_concrete_function(spec)

    def _in_order(self, found: Found) -> Found:
        """Returns losses in the order of their names, which are the same in every call."""
        if self.names and found.losses.keys() != set(self.names):
            raise ConfigError(
                f'{_name(self.loss)} returned the losses {sorted(found.losses)}, and before that '
                f'{self.names}. They must be the same in training and evaluation: return zeros '
                'for one that does not count.'
            )
        return Found({name: found.losses[name] for name in sorted(found.losses)}, found.outputs)

    def results(self, losses: Sequence[float]) -> dict[str, float]:
        """Returns the named losses, '<name>_loss', if there are several."""
        if len(self.names) == 1:
            return {}
        return {f'{n}_loss': float(v) for n, v in zip(self.names, losses, strict=True)}

    def __call__(self, model: keras.Model, batch: dict, *, training: bool) -> Found:
        """Calls the model, as often as the losses ask for it.

        Raises:
            ConfigError: the losses are not of the promised kind, or are for outputs that are not.
        """
        if self._is_whole:
            return self._in_order(named(self.loss(model, batch, training), self.loss))
        outputs = model(batch['inputs'], training=training)
        labels = batch.get('labels')
        if not isinstance(self.loss, Mapping):
            return Found({ONLY: per_example_loss(self.loss, labels, outputs)}, outputs)
        losses = {
            name: per_example_loss(each, part_of(labels, name), outputs[name])
            for name, each in self.loss.items()
        }
        return Found(losses, outputs)

    def _check_outputs(self, output_spec) -> None:
        """Raises ConfigError if there is a loss for an output that the model does not have."""
        has = sorted(output_spec) if isinstance(output_spec, dict) else None
        for name in self.loss:
            if has is None or name not in has:
                what = f'has {", ".join(map(repr, has))}' if has else 'does not return a dict'
                raise ConfigError(
                    f'There is a loss for the output {name!r}, but the model {what}.'
                    f'{nearest(name, has or ())}'
                )

    @contextlib.contextmanager
    def watched(self, watch: Callable[[Callable], Callable]) -> Iterator[None]:
        """Has each loss function looked at by `watch`, function -> function, within the block."""
        loss = self.loss
        with contextlib.ExitStack() as stack:
            if isinstance(loss, Mapping):
                self.loss = {n: _watched(stack, each, watch) for n, each in loss.items()}
            else:
                self.loss = _watched(stack, loss, watch)
            try:
                yield
            finally:
                self.loss = loss


class WholeStep(Objective):
    """Losses whose gradients the user computes as well.

    Args:
        step: a function (model, weights, batch) -> (losses, gradients): `weights` are the values of
            `model.trainable_variables`, for a `tf.GradientTape` to watch; losses are as for
            `Objective`; there is a gradient, or None, for each weight, of what is to be minimised
            as the mean over the examples that it was given. Penalties are its own business.
    """

    def __init__(self, step: Callable):
        self.loss, self.names, self._is_whole = step, [ONLY], True

    def __call__(self, model: keras.Model, batch: dict, *, training: bool) -> Found:
        return self.with_gradients(model, batch)[0]

    def with_gradients(self, model: keras.Model, batch: dict) -> tuple[Found, list]:
        """Returns the losses, and a gradient or None for each of `model.trainable_variables`.

        Raises:
            ConfigError: it is not what was promised.
        """
        weights = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
        returned = self.loss(model, weights, batch)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ConfigError(f'{_name(self.loss)} must return (losses, gradients).')
        losses, gradients = returned
        fits = isinstance(gradients, list | tuple) and len(gradients) == len(weights)
        if not fits or any(
            g is not None and g.shape != w.shape for g, w in zip(gradients, weights, strict=True)
        ):
            raise ConfigError(
                f'{_name(self.loss)} must return a gradient, or None, for each of the '
                f'{len(weights)} weights, and of its shape.'
            )
        return self._in_order(named(losses, self.loss)), list(gradients)


def named(returned, function: Callable) -> Found:
    """Returns what a user's function of a whole model has returned, checked.

    Raises:
        ConfigError: these are no losses of one value an example.
    """
    outputs = None
    if isinstance(returned, tuple) and len(returned) == 2:
        returned, outputs = returned
    if tf.is_tensor(returned) or keras.ops.is_tensor(returned):
        returned = {ONLY: returned}
    if not isinstance(returned, dict) or not returned:
        raise ConfigError(
            f'{_name(function)} must return a dict of losses, name -> [batch, ...], alone or '
            f'before the outputs for the metrics; it returned {type(returned).__name__}.'
        )
    losses = {
        name: per_example_loss(_given(name, values), None, values)
        for name, values in returned.items()
    }
    return Found(losses, outputs)


def _given(name: str, values: tf.Tensor) -> Callable:
    """A loss function that has been called already."""

    def given(*_):
        return values

    given.__name__ = name
    return given


def _check(loss) -> None:
    if isinstance(loss, type):
        home = 'keras.losses.' if loss.__module__.startswith('keras.') else ''
        raise ConfigError(
            f'The loss is the class {loss.__name__}; give an instance. In gin, write it called: '
            f'LOSS = @{home}{loss.__name__}().'
        )


def _takes_model(loss) -> bool:
    if isinstance(loss, Mapping | keras.losses.Loss):
        return False
    try:
        return list(inspect.signature(loss).parameters)[:3] == ['model', 'batch', 'training']
    except (TypeError, ValueError):
        return False


def _watched(stack: contextlib.ExitStack, loss: Callable, watch: Callable) -> Callable:
    if not isinstance(loss, keras.losses.Loss):
        return watch(loss)
    # What is called of it, and it must stay a Keras loss to be called that way.
    loss.call = watch(loss.call)
    stack.callback(functools.partial(delattr, loss, 'call'))
    return loss


def _name(function: Callable) -> str:
    return repr(getattr(function, '__name__', function))
