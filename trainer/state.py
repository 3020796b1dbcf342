"""What is trained: a model, its optimizer and a few counters, as one table of named tensors.

Everything a step reads and writes is in `State.variables`, keyed by path, so that a checkpoint
can be complete and be compared bit by bit. Three things are left out on purpose because they
are functions of the configuration and the step: the state of random generators, the learning
rate, and metrics.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.errors import ConfigError, nearest
from trainer.groups import REST, Group, GroupedOptimizer, assign, flat

PRECISIONS = {'float32': 'float32', 'bfloat16': 'mixed_bfloat16', 'float16': 'mixed_float16'}
INITIAL_LOSS_SCALE = 2.0**15
AVERAGES = 'averages/'


class State:
    """A built model and optimizer, and counters, all created under one strategy.

    Attributes:
        model: the built `keras.Model`.
        optimizer: the built `keras.optimizers.Optimizer`, a `GroupedOptimizer` where there are
            groups, or None where nothing is trained.
        groups: the group of each of `model.trainable_variables`.
        output_spec: spec of the model's outputs for a batch of unknown size.
        step: int64 scalar, the number of steps taken, skipped ones included.
        skipped: int64 scalar, the number of steps skipped because they were not finite.
        loss_scale: float32 scalar; stays 1 unless `scales_loss`.
        scales_loss: whether the precision is float16, whose gradients underflow.
        good_steps: int64 scalar, finite steps since the loss scale last changed.
        seeds: the model's random generator states, in the model's order.
        moving: the other non-trainable variables (batch-norm statistics and the like).
        variables: path -> `tf.Variable`, in path order; the whole state.
    """

    def __init__(
        self,
        model,
        optimizer,
        output_spec,
        *,
        groups: Mapping[str, Group] | None = None,
        scales_loss: bool = False,
    ):
        self.scales_loss = scales_loss
        self.model, self.optimizer, self.output_spec = model, optimizer, output_spec
        self.groups = [(groups or {}).get(v.path, REST) for v in model.trainable_variables]
        # The name of the loss that alone trains it, of each trainable variable; None: all do.
        self.trained_by = [group.loss for group in self.groups]
        self.moving, self.seeds = [], []
        for variable in model.non_trainable_variables:
            is_seed = variable.path.endswith('seed_generator_state')
            (self.seeds if is_seed else self.moving).append(variable)
        self.step = _counter(0, tf.int64)
        self.skipped = _counter(0, tf.int64)
        self.loss_scale = _counter(INITIAL_LOSS_SCALE if scales_loss else 1.0, tf.float32)
        self.good_steps = _counter(0, tf.int64)
        self.variables = self._name_variables()

    def _name_variables(self) -> dict[str, tf.Variable]:
        # In the model's order, which is the same whatever is frozen.
        kept = {id(v) for v in self.model.trainable_variables + self.moving}
        named = [(v.path, v.value) for v in self.model.variables if id(v) in kept]
        averages = _averages(self.optimizers)
        if self.optimizer is not None:
            # The configuration says what the learning rate is; a checkpoint must not overrule it.
            constants = [getattr(one, '_learning_rate', None) for one in self.optimizers]
            named += [
                (v.path, v.value)
                for v in self.optimizer.variables
                if not any(v is known for known in [*constants, *(a for _, a in averages)])
            ]
            named += [
                ('phalanx/step', self.step),
                ('phalanx/skipped', self.skipped),
                ('phalanx/loss_scale', self.loss_scale),
                ('phalanx/good_steps', self.good_steps),
            ]
        table: dict[str, tf.Variable] = {}
        for path, variable in named:
            # Two layers of one name in a subclassed model: the order of creation tells them apart.
            copies, unique = 1, path
            while unique in table:
                copies += 1
                unique = f'{path}~{copies}'
            table[unique] = variable
        paths = {id(variable): path for path, variable in table.items()}
        for variable, average in averages:
            table[AVERAGES + paths[id(variable.value)]] = average.value
        return dict(sorted(table.items()))

    @property
    def evaluated(self) -> list[keras.Variable]:
        """What stands for `model.trainable_variables` where the model is evaluated.

        The running averages, if the optimizer keeps any (`use_ema`), or the variables themselves.
        """
        averages = {id(v): a for v, a in _averages(self.optimizers)}
        return [averages.get(id(v), v) for v in self.model.trainable_variables]

    def call(
        self, function: Callable[[], Any], trainable: Sequence, moving: Sequence, seeds: Sequence
    ) -> tuple[Any, list[tf.Tensor], list[tf.Tensor]]:
        """Calls what calls the model as a pure function of the model's variables' values.

        `Layer.stateless_call` would pass over `__call__`, and with it over all layers that are
        not handed `training` by the model's own code: no dropout, no batch statistics.

        Args:
            function: calls `model`, once or more often.
            trainable, moving, seeds: values for `model.trainable_variables`, `moving`, `seeds`.

        Returns:
            What the function returns; the new values of `moving`, the very tensor that was passed
            where the model leaves one alone; the regularisation penalties, a list of scalars.
        """
        variables = [*self.model.trainable_variables, *self.moving, *self.seeds]
        values = zip(variables, [*trainable, *moving, *seeds], strict=True)
        with keras.StatelessScope(values, collect_losses=True) as scope:
            returned = function()
            penalties = self.model.losses
        return returned, [scope.get_current_value(v) for v in self.moving], penalties

    def snapshot(self) -> dict[str, tf.Tensor]:
        """Returns the state as tensors in host memory, which later steps leave unchanged.

        On CPU no byte is copied here: a tensor keeps the buffer, and TensorFlow gives the variable
        a new one when it is next updated.
        """
        with tf.device('CPU:0'):
            return {path: tf.identity(v.read_value()) for path, v in self.variables.items()}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Assigns every variable on every replica.

        Args:
            tensors: path -> array, from a checkpoint of the same model and optimizer. A state
                without an optimizer takes the model's part of it, and in place of a variable its
                average, if there is one.

        Raises:
            ConfigError: a variable is missing, superfluous, or has another shape or dtype.
        """
        if self.optimizer is None:
            averaged = {p: tensors[AVERAGES + p] for p in tensors if AVERAGES + p in tensors}
            tensors = {**tensors, **averaged}
        missing = [path for path in self.variables if path not in tensors]
        extra = [path for path in tensors if path not in self.variables]
        if missing or (extra and self.optimizer is not None):
            raise ConfigError(
                'The checkpoint is of another model or optimizer: '
                f'{_some("not in the checkpoint", missing)}{_some("only in it", extra)}'
                'Restore the configuration it was trained with (model_dir/config), or use '
                'another model_dir.'
            )
        for path, variable in self.variables.items():
            value = tensors[path]
            if tuple(value.shape) != tuple(variable.shape) or value.dtype != variable.dtype:
                raise ConfigError(
                    f'The checkpoint holds {path!r} as {value.dtype}{list(value.shape)}, the model '
                    f'as {variable.dtype.name}{list(variable.shape)}. Restore the configuration '
                    'it was trained with (model_dir/config), or use another model_dir.'
                )
        for path, variable in self.variables.items():
            variable.assign(tensors[path])

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The optimizers of Keras: the run's own first, then those of groups."""
        if isinstance(self.optimizer, GroupedOptimizer):
            return [share.optimizer for share in self.optimizer.shares]
        return [] if self.optimizer is None else [self.optimizer]

    @property
    def num_parameters(self) -> int:
        """The number of trainable scalars."""
        return sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)

    def scalars(self) -> dict[str, float]:
        """Returns the rate that the next update would use, and how many steps were skipped.

        The rate is that of the run's own optimizer; one of a group is named after it.
        """
        names = ['learning_rate'] + [f'learning_rate/{o.name}' for o in self.optimizers[1:]]
        rates = [float(keras.ops.convert_to_numpy(o.learning_rate)) for o in self.optimizers]
        return {**dict(zip(names, rates, strict=True)), 'skipped_steps': int(self.skipped.numpy())}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the trainable variables by path."""
        return {v.path: v.numpy() for v in self.model.trainable_variables}


def _averages(
    optimizers: Sequence[keras.optimizers.Optimizer],
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Returns each variable of which an optimizer keeps a running average, and the average."""
    return [
        pair
        for one in optimizers
        if one.use_ema
        for pair in zip(one._trainable_variables, one._model_variables_moving_average, strict=True)
    ]


def _reason(error: Exception) -> str:
    """The sentence that says it, out of what Keras writes around it."""
    lines = re.sub(r'\x1b\[\d*m', '', str(error)).splitlines()
    said = [x for x in lines if x.strip() and not x.startswith('Exception encountered')]
    return (said or lines or [type(error).__name__])[0].rstrip('.')


def _misfit(built: keras.Model, inputs_spec, error: Exception) -> str:
    """Says that a model and the data differ; by the shapes alone where the model tells its own."""
    shapes = tf.nest.map_structure(lambda spec: tuple(spec.shape[1:]), inputs_spec)
    own = getattr(built, 'input_shape', None)
    if isinstance(inputs_spec, tf.TensorSpec) and isinstance(own, tuple) and own[1:] != shapes:
        return (
            f'The model {built.name!r} takes inputs of shape {own[1:]}, but those of the data are '
            f'{shapes}. Set INPUT_SHAPE = {shapes}, or change the input of your model.'
        )
    return (
        f'The model {built.name!r} does not accept the inputs of the data, whose shape is '
        f'{shapes}: {_reason(error)}. Make INPUT_SHAPE, or the input of your model, agree with '
        'the data; --verbosity=1 shows where it failed.'
    )


def _counter(value: float, dtype: tf.DType) -> tf.Variable:
    return tf.Variable(
        value,
        dtype=dtype,
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _some(what: str, paths: list[str]) -> str:
    if not paths:
        return ''
    more = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
    return f'{", ".join(map(repr, paths[:3]))}{more} {"is" if len(paths) == 1 else "are"} {what}. '


def build_model(
    model: Callable[[], keras.Model],
    inputs_spec,
    *,
    precision: str = 'float32',
    seed: int = 0,
    strategy: tf.distribute.Strategy | None = None,
):
    """Calls a model's builder and creates all its variables, always under the same names.

    Args:
        model: a function or class that returns a `keras.Model` when called without arguments.
        inputs_spec: spec of a batch of inputs, 'inputs' of `trainer.data.batch.batch_spec`.
        precision: 'float32', 'bfloat16' or 'float16', what the layers compute in.
        seed: makes the initial weights.
        strategy: where the variables live; None for an ordinary model outside any strategy.

    Returns:
        The built model and the spec of its outputs.

    Raises:
        ConfigError: unknown precision, something that is no Keras model, or a model that does
            not accept the data.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f'precision = {precision!r} is none of {", ".join(PRECISIONS)}.'
            f'{nearest(str(precision), PRECISIONS)}'
        )
    # Automatic names ('conv2d_1') count up over the life of a process; a checkpoint's must not.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(PRECISIONS[precision])
    with strategy.scope() if strategy else contextlib.nullcontext():
        built = _make(model, keras.Model, 'model', 'MODEL = @my_model')
        inputs = tf.nest.map_structure(
            lambda spec: keras.KerasTensor(spec.shape, dtype=spec.dtype.name), inputs_spec
        )
        try:
            outputs = built(inputs, training=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(_misfit(built, inputs_spec, error)) from error
    return built, outputs


def build_state(
    strategy: tf.distribute.Strategy,
    model: Callable[[], keras.Model],
    optimizer: Callable[[], keras.optimizers.Optimizer] | None,
    inputs_spec,
    *,
    groups: Sequence[Group | Sequence[Group]] = (),
    seed: int = 0,
    precision: str = 'float32',
) -> State:
    """Builds everything that is trained, in the strategy's scope, with no variable left for later.

    Under a multi-worker strategy every variable is broadcast from worker 0 as it is created, so
    all workers must call this with the same configuration at the same time.

    Args:
        strategy: where the variables live.
        model: see `build_model`.
        optimizer: a function or class that returns a Keras optimizer; None to evaluate only.
        inputs_spec: see `build_model`.
        groups: variables that are trained in another way than the rest.
        seed: makes the initial weights.
        precision: see `build_model`.

    Returns:
        The state at step 0.

    Raises:
        ConfigError: see `build_model`; an optimizer that does by itself what the step does; a
            group that matches nothing.
    """
    built, output_spec = build_model(
        model, inputs_spec, precision=precision, seed=seed, strategy=strategy
    )
    with strategy.scope():
        made, by_path = None, None
        if optimizer is not None:
            groups = flat(groups)
            by_path = assign(groups, built) if groups else None
            made = _make_optimizer(optimizer)
            if by_path:
                made = GroupedOptimizer(made, built.trainable_variables, by_path, _make_optimizer)
            else:
                made.build(built.trainable_variables)
        scaled = precision == 'float16'
        state = State(built, made, output_spec, groups=by_path, scales_loss=scaled)
        for variable, average in _averages(state.optimizers):
            average.assign(variable)  # Until the first update Keras has zeros there.
        return state


def _make(maker, kind: type, what: str, example: str):
    """Calls what was given uncalled, so that its variables are made here and nowhere else."""
    given = isinstance(maker, kind) or not callable(maker)
    name = getattr(maker, '__name__', maker)
    try:
        made = maker if given else maker()
    except ConfigError:
        raise
    except ValueError as error:
        shape = 'INPUT_SHAPE and ' if kind is keras.Model else ''
        raise ConfigError(
            f'The {what} {name!r} cannot be built: {_reason(error)}. Look at {shape}its '
            'parameters; --verbosity=1 shows where it failed.'
        ) from error
    if given or not isinstance(made, kind):
        got = f'got {maker!r}' if given else f'{name!r} returned {type(made).__name__}'
        raise ConfigError(
            f'The {what} must be a function or class that returns a keras {what} when called '
            f'without arguments; {got}. In gin, write it uncalled: {example}.'
        )
    return made


def _make_optimizer(maker: Callable) -> keras.optimizers.Optimizer:
    example = 'OPTIMIZER = @keras.optimizers.Adam'
    made = _make(maker, keras.optimizers.Optimizer, 'optimizer', example)
    if isinstance(made, keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            'LossScaleOptimizer decides on the gradients of one replica. Give the optimizer it '
            "wraps, and train.precision = 'float16' scales the loss on all of them."
        )
    if isinstance(made, getattr(keras.optimizers, 'MultiOptimizer', ())):
        raise ConfigError(
            'MultiOptimizer has several learning rates and counters, which Phalanx cannot log and '
            'reduce as one. Give one optimizer, and other ones to groups: Group.optimizer.'
        )
    if made.gradient_accumulation_steps:
        raise ConfigError(
            f'gradient_accumulation_steps = {made.gradient_accumulation_steps} of the optimizer '
            'does not work under tf.distribute. Set train.accumulate instead.'
        )
    if made.use_ema and made.ema_overwrite_frequency:
        raise ConfigError(
            f'ema_overwrite_frequency = {made.ema_overwrite_frequency} of the optimizer does not '
            'work under tf.distribute. Leave it None.'
        )
    return made
