"""What is made of stored features: the inputs, labels and weights of a batch."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainer.data import bad_records, order
from trainer.data.preprocess import Adapted
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest

# Stands for the record of a row that fills up the last batch of an evaluation.
PADDING = -1

# (positions, ids), both int64 [B / R], -> what a replica gets for these rows; of a `Stream`, whose
# features come by themselves, (positions, ids, features).
Batch = Callable[..., Features]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read and what is done to it: stored features -> augment -> preprocess -> inputs.

    The functions consist of graph operations on whole batches (no Python `if` on tensors), and
    return the features with the first dimension as it was.

    Attributes:
        source: The examples.
        inputs: The features that the model sees: a name gives it the tensor itself, a tuple of
            names a dict.
        label: The feature that the loss compares with; it may be one of the inputs. A tuple of
            names gives the loss a dict, None nothing.
        weight: The feature, one number per example, by which the losses are weighted.
        class_weights: One number per class, by which the losses of its examples are weighted, on
            top of `weight`. Labels are class numbers, or one-hot.
        preprocess: Deterministic, features -> features. It sees no label and no weight, as it
            becomes part of the exported model, which gets neither.
        augment: (features, seeds) -> features, in training only, before `preprocess`. It sees
            all features as they are stored; see `augment`.
        on_bad_record: What happens at a damaged record: 'stop' names it and ends the run, 'skip'
            gives it weight 0 and lists it, on every worker and after every resume alike.
    """

    source: Source
    inputs: str | tuple[str, ...] = 'image'
    label: str | tuple[str, ...] | None = 'label'
    weight: str | None = None
    class_weights: Sequence[float] | None = None
    preprocess: Callable[[Features], Features] | None = None
    augment: Callable[[Features, tf.Tensor], Features] | None = None
    on_bad_record: Literal['stop', 'skip'] = 'stop'

    def __post_init__(self):
        if self.on_bad_record not in ('stop', 'skip'):
            raise ConfigError(
                f"Data.on_bad_record is {self.on_bad_record!r}; it is 'stop' or 'skip'."
                f'{nearest(str(self.on_bad_record), ("stop", "skip"))}'
            )
        for weight in self.class_weights or ():
            if not 0 <= weight < math.inf:
                raise ConfigError(f'Data.class_weights holds {weight!r}, which is no weight.')
        if self.on_bad_record == 'skip' and self.source.in_order_only:
            raise ConfigError(
                "Data.on_bad_record is 'skip', which a stream cannot do: let it leave out what "
                'cannot be used by itself.'
            )


def train_batch(data: Data, *, seed: int, num_classes: int | None = None) -> Batch:
    """Returns what makes the batches of training, see `pipeline.train_batches`.

    What it makes depends on its arguments and on nothing else, so any process that has the data
    can make any batch.

    Args:
        data: What to read.
        seed: Of augmentation, in [0, 2**31).
        num_classes: What labels must be below, or None.
    """

    def batch(positions: tf.Tensor, ids: tf.Tensor, came: Features | None = None) -> Features:
        features, good = _fetch(data, ids, num_classes, came)
        if data.augment is not None:
            seeds = order.example_seeds(positions, seed=seed)
            features = _checked(data.augment(dict(features), seeds), ids.shape[0], 'augment')
        return _without_bad({**_model_batch(data, features), 'ids': ids}, good)

    return batch


def eval_batch(data: Data, *, num_classes: int | None = None) -> Batch:
    """Returns what makes batches of evaluation: as in training, without `augment`, with `weights`.

    Rows whose id is PADDING have weight 0.
    """

    def batch(positions: tf.Tensor, ids: tf.Tensor, came: Features | None = None) -> Features:
        del positions
        features, good = _fetch(data, tf.maximum(ids, 0), num_classes, came)
        result = _model_batch(data, features)
        weights = result.get('weights', tf.ones_like(ids, tf.float32))
        result |= {'ids': ids, 'weights': tf.where(ids >= 0, weights, 0.0)}
        return _without_bad(result, good)

    return batch


@contextlib.contextmanager
def bad_records_told(
    data: Data, batches: Iterable[np.ndarray], num_classes: int | None
) -> Iterator[None]:
    """Turns the error of a damaged record into a sentence, see `bad_records.told`."""
    skips = data.on_bad_record == 'skip'
    with bad_records.told(data.source, batches, class_label(data), num_classes, skips=skips):
        yield


def learnt(data: Data, state: dict[str, Any] | None) -> Data:
    """Returns the data with a preprocessing that has learnt `state`, if it is one that learns.

    Args:
        data: What to read.
        state: Of `Adapted.state`, from a manifest or of other data; None leaves it as it is.

    Raises:
        ConfigError: The state is of another preprocessing.
    """
    if state is None or not isinstance(data.preprocess, Adapted):
        return data
    return dataclasses.replace(data, preprocess=data.preprocess.with_state(state))


def learnt_state(data: Data) -> dict[str, Any] | None:
    """Returns what the preprocessing has learnt, None if it is not one that learns."""
    return data.preprocess.state if isinstance(data.preprocess, Adapted) else None


def batch_spec(data: Data, batch_size: int | None = None) -> dict:
    """Returns the specs of `inputs` (a TensorSpec or a dict), `labels` and `weights` of a batch.

    Labels and weights are there as far as the data have them.

    Args:
        data: What to read.
        batch_size: Their first dimension.

    Raises:
        ConfigError: `data` names features that do not exist, or `preprocess` does not keep to its
            contract.
    """
    trace = tf.function(lambda features: _model_batch(data, features), autograph=False)
    outputs = trace.get_concrete_function(_batched(data.source.element_spec)).structured_outputs
    # Traced outputs name their operations; specs that are compared and saved should not.
    return tf.nest.map_structure(
        lambda t: tf.TensorSpec([batch_size, *t.shape[1:]], t.dtype), outputs
    )


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


def _fetch(
    data: Data, ids: tf.Tensor, num_classes: int | None, came: Features | None
) -> tuple[Features, tf.Tensor | None]:
    if came is not None:
        return bad_records.checked(came, class_label(data), num_classes), None
    if data.on_bad_record == 'skip':
        return bad_records.fetch_good(data.source, ids, class_label(data), num_classes)
    return bad_records.fetch(data.source, ids, class_label(data), num_classes), None


def _without_bad(batch: Features, good: tf.Tensor | None) -> Features:
    """Returns a batch whose bad rows count for nothing and show as such."""
    if good is None:
        return batch
    ids = batch['ids']
    weights = batch.get('weights', tf.ones_like(ids, tf.float32))
    return {
        **batch,
        'ids': tf.where(good | (ids < 0), ids, -2 - ids),
        'weights': tf.where(good, weights, 0.0),
    }


def _batched(spec: dict[str, tf.TensorSpec]) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec([None, *s.shape], s.dtype) for name, s in spec.items()}


def _model_batch(data: Data, features: Features) -> dict:
    """Returns `inputs`, `labels` and, if there is a weight, `weights`, from stored features."""
    for role in ('label', 'weight'):
        for name in _names(getattr(data, role)):
            _expect(features, name, f'Data.{role}')
    processed = _preprocess(data, features)
    # A label or weight that is among the inputs too comes out of `preprocess` as they do.
    features = {**features, **processed}
    result = {'inputs': _select(data, processed)}
    if isinstance(data.label, str):
        result['labels'] = features[data.label]
    elif data.label:
        result['labels'] = {name: features[name] for name in data.label}
    if data.weight is not None:
        weights = features[data.weight]
        if weights.shape.rank != 1:
            raise ConfigError(
                f'Data.weight, {data.weight!r}, must be one number per example, but has the shape '
                f'{list(weights.shape[1:])}.'
            )
        result['weights'] = tf.cast(weights, tf.float32)
    if data.class_weights is not None:
        of_class = _class_weights(data.class_weights, result.get('labels'))
        result['weights'] = result.get('weights', 1.0) * of_class
    return result


def _class_weights(class_weights: Sequence[float], labels: tf.Tensor) -> tf.Tensor:
    weights = tf.constant(class_weights, tf.float32)
    if not tf.is_tensor(labels):
        raise ConfigError('Data.class_weights needs one label: Data.label is none, or several.')
    if labels.shape.rank == 1 and labels.dtype.is_integer:
        return tf.gather(weights, labels)
    one_hot = labels.shape.rank == 2 and labels.dtype.is_floating
    if one_hot and labels.shape[1] == len(class_weights):
        return tf.reduce_sum(tf.cast(labels, tf.float32) * weights, axis=1)
    raise ConfigError(
        f'Data.class_weights has {len(class_weights)} numbers, one for each class, but the labels '
        f'are {labels.dtype.name} of shape {list(labels.shape)}: neither class numbers nor one-hot.'
    )


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


def _names(one_or_more: str | Sequence[str] | None) -> tuple[str, ...]:
    return (one_or_more,) if isinstance(one_or_more, str) else tuple(one_or_more or ())


def class_label(data: Data) -> str:
    """The feature that may be the number of a class."""
    return data.label if isinstance(data.label, str) else ''


def _input_names(data: Data) -> tuple[str, ...]:
    names = _names(data.inputs)
    if not names:
        raise ConfigError('Data.inputs is empty: name the feature or features the model sees.')
    return names


def _model_features(data: Data, features: dict) -> list[str]:
    """Returns the names of the stored features that the model's inputs are made of."""
    names = _input_names(data)
    if data.preprocess is not None:
        hidden = {*_names(data.label), *_names(data.weight)}.difference(names)
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
