"""Batches for each replica: which rows of the global batch it gets, and what is done to them."""

import dataclasses
from collections.abc import Callable, Iterator

import tensorflow as tf

from trainer.data import order
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read and what is done to it: stored features -> augment -> preprocess -> inputs.

    The functions consist of graph operations on whole batches (no Python `if` on tensors), and
    return the features with the first dimension as it was.

    Attributes:
        source: The examples.
        inputs: The features that the model sees: a name gives it the tensor itself, a tuple of
            names a dict.
        label: The feature that the loss compares with; it may be one of the inputs.
        weight: The feature, one number per example, by which the losses are weighted.
        preprocess: Deterministic, features -> features. It sees no label and no weight, as it
            becomes part of the exported model, which gets neither.
        augment: (features, seeds) -> features, in training only, before `preprocess`. It sees
            all features as they are stored; see `augment`.
    """

    source: Source
    inputs: str | tuple[str, ...] = 'image'
    label: str = 'label'
    weight: str | None = None
    preprocess: Callable[[Features], Features] | None = None
    augment: Callable[[Features, tf.Tensor], Features] | None = None


def train_batches(
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int,
    left_out: order.Windows = (),
) -> Iterator:
    """Returns an endless iterator over the batches of training, in the order of `order`.

    Replica r of R gets rows [r * B / R, (r + 1) * B / R) of each global batch of B, whichever
    worker it lives on, and each worker reads its own rows only. Batches may straddle epochs.

    Args:
        data: What to read.
        strategy: The strategy whose replicas the batches are for.
        seed: Of the order and of augmentation, in [0, 2**31).
        global_batch_size: Examples in a step over all replicas, B.
        start_step: The step of the first batch.
        left_out: Positions that are not read, see `order.used`.

    Returns:
        An iterator whose elements are for `strategy.run`. Each replica gets a dict of `inputs`,
        `labels`, `ids` (int64 [B / R], record numbers) and, if `data.weight`, `weights`
        (float32 [B / R]).

    Raises:
        ConfigError: The batch size does not fit the strategy, or `data` does not fit together.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f'The seed is {seed!r}; it must be a whole number from 0 to 2**31 - 1.')
    _check_batch_size(global_batch_size, strategy)

    def ids_at(positions: tf.Tensor) -> tf.Tensor:
        return data.source.records(order.used(positions, left_out), seed=seed)

    def batch(positions: tf.Tensor, ids: tf.Tensor) -> Features:
        features = _fetch(data, ids)
        if data.augment is not None:
            seeds = order.example_seeds(order.used(positions, left_out), seed=seed)
            features = _checked(data.augment(dict(features), seeds), ids.shape[0], 'augment')
        return {**_model_batch(data, features), 'ids': ids}

    return _distribute(data, strategy, global_batch_size, start_step, ids_at, batch)


def eval_batches(
    data: Data, strategy: tf.distribute.Strategy, *, global_batch_size: int
) -> tuple[Iterator, int]:
    """Returns an iterator over the examples in the order of the source, each exactly once.

    Rows are divided among replicas as in `train_batches`. The last batch is filled up with rows
    of `ids` -1 and weight 0. The iterator has no end, which saves the workers from agreeing on
    one before every step, and starts over after each pass, so it may serve many.

    Args:
        data: What to read; its `augment` is not applied.
        strategy: The strategy whose replicas the batches are for.
        global_batch_size: Examples in a step over all replicas.

    Returns:
        The iterator, whose elements are as in training with `weights` always there, and the
        number of steps in a pass.

    Raises:
        ConfigError: The batch size does not fit the strategy, or `data` does not fit together.
    """
    _check_batch_size(global_batch_size, strategy)
    num_examples = data.source.num_examples
    num_steps = -(-num_examples // global_batch_size)

    def ids_at(positions: tf.Tensor) -> tf.Tensor:
        in_pass = positions % (num_steps * global_batch_size)
        return tf.where(in_pass < num_examples, in_pass, -1)

    def batch(positions: tf.Tensor, ids: tf.Tensor) -> Features:
        del positions
        result = _model_batch(data, _fetch(data, tf.maximum(ids, 0)))
        weights = result.get('weights', tf.ones_like(ids, tf.float32))
        return {**result, 'ids': ids, 'weights': tf.where(ids >= 0, weights, 0.0)}

    return _distribute(data, strategy, global_batch_size, 0, ids_at, batch), num_steps


def batch_spec(data: Data) -> dict:
    """Returns the specs of `inputs` (a TensorSpec or a dict of them) and `labels` of a batch.

    Their first dimension is None.

    Raises:
        ConfigError: `data` names features that do not exist, or `preprocess` does not keep to its
            contract.
    """
    trace = tf.function(lambda features: _model_batch(data, features), autograph=False)
    outputs = trace.get_concrete_function(_batched(data.source.element_spec)).structured_outputs
    # Traced outputs name their operations; specs that are compared and saved should not.
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), outputs)
    return {key: specs[key] for key in ('inputs', 'labels')}


def raw_spec(data: Data) -> dict[str, tf.TensorSpec]:
    """Returns the specs, with None as first dimension, of the stored features the model needs.

    These are the features that `model_inputs` takes: all but label and weight if there is a
    `preprocess`, which may look at any, and only the inputs if not.
    """
    spec = _batched(data.source.element_spec)
    return {name: spec[name] for name in _model_features(data, spec)}


def model_inputs(data: Data, features: Features) -> tf.Tensor | Features:
    """Returns what the model sees, given the features of `raw_spec`; part of exported models.

    Args:
        data: Its `preprocess` and `inputs` are applied.
        features: For each name of `raw_spec` a tensor [B, ...]; others are not looked at.

    Raises:
        ConfigError: See `batch_spec`.
    """
    return _select(data, _preprocess(data, features))


def _distribute(
    data: Data,
    strategy: tf.distribute.Strategy,
    global_batch_size: int,
    start_step: int,
    ids_at: Callable[[tf.Tensor], tf.Tensor],
    batch: Callable[[tf.Tensor, tf.Tensor], Features],
) -> Iterator:
    """Builds the iterator of batch(positions, ids_at(positions)) for each step and replica."""
    num_replicas = strategy.num_replicas_in_sync
    size = global_batch_size // num_replicas
    batch_spec(data)  # Raises for mistakes in `data`, before threads and devices take part.

    def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        num_local = num_replicas // context.num_input_pipelines
        first_replica = context.input_pipeline_id * num_local
        # The order of some batches at a time: its many small operations cost more than its work.
        together = max(1, min(16, 2048 // size))

        # One row per step and local replica: the strategy deals them out in turn.
        @tf.autograph.experimental.do_not_convert
        def rows(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            numbers = number + tf.range(together, dtype=tf.int64)
            replicas = first_replica + numbers % num_local
            firsts = numbers // num_local * global_batch_size + replicas * size
            positions = firsts[:, tf.newaxis] + tf.range(size, dtype=tf.int64)
            ids = ids_at(tf.reshape(positions, [together * size]))
            return positions, tf.reshape(ids, [together, size])

        options = tf.data.Options()
        # Batches are made side by side; more threads within each would only get in their way.
        options.threading.max_intra_op_parallelism = 1
        options.experimental_warm_start = True
        return (
            tf.data.Dataset.counter(start_step * num_local, together)
            .map(rows)
            .unbatch()
            .map(
                tf.autograph.experimental.do_not_convert(batch),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )

    devices = strategy.extended.worker_devices
    if len(devices) == 1 and tf.DeviceSpec.from_string(devices[0]).device_type == 'CPU':
        # There is nothing to deal out or to copy, and the strategy's iterator would hand each
        # batch from thread to thread for 0.17 ms.
        resolver = strategy.cluster_resolver
        worker = resolver.task_id if resolver is not None else None
        return iter(dataset(tf.distribute.InputContext(num_replicas, worker or 0, num_replicas)))
    return iter(strategy.distribute_datasets_from_function(dataset))


def _check_batch_size(global_batch_size: int, strategy: tf.distribute.Strategy) -> None:
    if isinstance(global_batch_size, bool) or not isinstance(global_batch_size, int):
        raise ConfigError(f'The batch size is {global_batch_size!r}; it must be a whole number.')
    num_replicas = strategy.num_replicas_in_sync
    if global_batch_size < 1 or global_batch_size % num_replicas:
        below = global_batch_size // num_replicas * num_replicas
        sizes = [str(size) for size in (below, below + num_replicas) if size > 0]
        raise ConfigError(
            f'The batch size, {global_batch_size}, cannot be divided among {num_replicas} '
            f'replica(s). Use {" or ".join(sizes) or num_replicas}.'
        )


def _batched(spec: dict[str, tf.TensorSpec]) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec([None, *s.shape], s.dtype) for name, s in spec.items()}


def _fetch(data: Data, ids: tf.Tensor) -> Features:
    """Reads records; a source that computes outside the graph may leave shapes unknown."""
    features = data.source.fetch(ids)
    return {
        name: tf.ensure_shape(features[name], [ids.shape[0], *spec.shape])
        for name, spec in data.source.element_spec.items()
    }


def _model_batch(data: Data, features: Features) -> dict:
    """Returns `inputs`, `labels` and, if there is a weight, `weights`, from stored features."""
    for role in ('label', 'weight'):
        name = getattr(data, role)
        if name is not None:
            _expect(features, name, f'Data.{role}')
    processed = _preprocess(data, features)
    # A label or weight that is among the inputs too comes out of `preprocess` as they do.
    features = {**features, **processed}
    result = {'inputs': _select(data, processed), 'labels': features[data.label]}
    if data.weight is not None:
        weights = features[data.weight]
        if weights.shape.rank != 1:
            raise ConfigError(
                f'Data.weight, {data.weight!r}, must be one number per example, but has the shape '
                f'{list(weights.shape[1:])}.'
            )
        result['weights'] = tf.cast(weights, tf.float32)
    return result


def _preprocess(data: Data, features: Features) -> Features:
    features = {name: features[name] for name in _model_features(data, features)}
    if data.preprocess is None:
        return features
    size = next(iter(features.values())).shape[0] if features else None
    return _checked(data.preprocess(features), size, 'preprocess')


def _select(data: Data, features: Features) -> tf.Tensor | Features:
    for name in _input_names(data):
        _expect(features, name, 'Data.inputs')
    if isinstance(data.inputs, str):
        return features[data.inputs]
    return {name: features[name] for name in data.inputs}


def _input_names(data: Data) -> tuple[str, ...]:
    names = (data.inputs,) if isinstance(data.inputs, str) else tuple(data.inputs)
    if not names:
        raise ConfigError('Data.inputs is empty: name the feature or features the model sees.')
    return names


def _model_features(data: Data, features: dict) -> list[str]:
    """Returns the names of the stored features that the model's inputs are made of."""
    names = _input_names(data)
    if data.preprocess is not None:
        hidden = {data.label, data.weight}.difference(names)
        return [name for name in features if name not in hidden]
    for name in names:
        _expect(features, name, 'Data.inputs')
    return list(names)


def _expect(features: dict, name: str, role: str) -> None:
    if name not in features:
        raise ConfigError(
            f'{role} names {name!r}, but the features are {sorted(features)}.'
            f'{nearest(name, features)}'
        )


def _checked(features: Features, size: int | None, role: str) -> Features:
    """Returns what a user's function returned, known to be a batch of `size` examples."""
    if not isinstance(features, dict):
        raise ConfigError(
            f'Data.{role} must return a dict of features, but returned {type(features).__name__}.'
        )
    result = {name: tf.convert_to_tensor(tensor) for name, tensor in features.items()}
    for name, tensor in result.items():
        if not tensor.shape[:1].is_compatible_with([size]):
            raise ConfigError(
                f'Data.{role} must keep the number of examples, but made {name!r} of shape '
                f'{tensor.shape} from a batch of {"any size" if size is None else size}.'
            )
        shape = tf.TensorShape([size]).concatenate(tensor.shape[1:])
        result[name] = tf.ensure_shape(tensor, shape)
    return result
