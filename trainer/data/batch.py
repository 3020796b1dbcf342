"""What is made of stored features: the inputs, labels and weights of a batch."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from trainer.data import order
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest

# What makes the batch of a replica: positions and record numbers, both int64 [B / R], to the dict
# that its step gets. It depends on nothing else, so it can be computed anywhere, and again.
Batch = Callable[[tf.Tensor, tf.Tensor], Features]


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


def train_batch(data: Data, *, seed: int) -> Batch:
    """Returns what makes batches of training: `inputs`, `labels`, `ids`, `weights` if there are.

    Args:
        data: What to read.
        seed: Of augmentation, in [0, 2**31).
    """

    def batch(positions: tf.Tensor, ids: tf.Tensor) -> Features:
        features = fetch(data, ids)
        if data.augment is not None:
            seeds = order.example_seeds(positions, seed=seed)
            features = checked(data.augment(dict(features), seeds), ids.shape[0], 'augment')
        return {**model_batch(data, features), 'ids': ids}

    return batch


def eval_batch(data: Data) -> Batch:
    """Returns what makes batches of evaluation: as in training, without `augment`, with `weights`.

    An `ids` of -1 is padding, of weight 0.
    """

    def batch(positions: tf.Tensor, ids: tf.Tensor) -> Features:
        del positions
        result = model_batch(data, fetch(data, tf.maximum(ids, 0)))
        weights = result.get('weights', tf.ones_like(ids, tf.float32))
        return {**result, 'ids': ids, 'weights': tf.where(ids >= 0, weights, 0.0)}

    return batch


def batch_spec(data: Data) -> dict:
    """Returns the specs of `inputs` (a TensorSpec or a dict of them) and `labels` of a batch.

    Their first dimension is None.

    Raises:
        ConfigError: `data` names features that do not exist, or `preprocess` does not keep to its
            contract.
    """
    trace = tf.function(lambda features: model_batch(data, features), autograph=False)
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


def _batched(spec: dict[str, tf.TensorSpec]) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec([None, *s.shape], s.dtype) for name, s in spec.items()}


def fetch(data: Data, ids: tf.Tensor) -> Features:
    """Reads records; a source that computes outside the graph may leave shapes unknown."""
    features = data.source.fetch(ids)
    return {
        name: tf.ensure_shape(features[name], [ids.shape[0], *spec.shape])
        for name, spec in data.source.element_spec.items()
    }


def model_batch(data: Data, features: Features) -> dict:
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
    return checked(data.preprocess(features), size, 'preprocess')


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


def checked(features: Features, size: int | None, role: str) -> Features:
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
