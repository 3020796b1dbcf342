"""Damaged records: which one it was and what is wrong with it, or the same batch without it.

A source fails as a whole when one of the records it is asked for is damaged. What is done then is
the same for all sources: the records are asked for one at a time.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from trainer.data.bad_record_list import Damage, listing
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, ReadError

# What TensorFlow makes of BadRecord, and raises itself for what it cannot parse or decode. Where it
# quotes a record that is no UTF-8, what is raised is that the text of the error is none.
DAMAGE = (tf.errors.InvalidArgumentError, tf.errors.DataLossError, UnicodeDecodeError)
ERRORS = (tf.errors.OpError, UnicodeDecodeError)
# What ends a step for other reasons than the data: a peer that is gone, memory that is full.
_OTHERS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
)
# An OSError that Python raised, within what TensorFlow makes of it.
_OUT_OF_REACH = re.compile(r'\b(?:ReadError: |\w*Error: (?=\[Errno \d+\]))(.+)')
# Sources need not be hashable, and with the source itself no other has its id. The bound is for who
# looks at one source after another.
_readers: dict[tuple[int, str, int | None], tuple[Source, Callable]] = {}
_MOST_READERS = 16


def fetch(source: Source, ids: tf.Tensor, label: str, num_classes: int | None = None) -> Features:
    """Reads records, and fails if one of them is damaged.

    Args:
        source: what is read.
        ids: int64 [B], record numbers.
        label: the feature that must be one of the classes, if it is a whole number.
        num_classes: how many there are, or None.

    Returns:
        The features of the source; one that computes outside the graph may leave shapes unknown,
        which are known here.
    """
    features = source.fetch(ids)
    features = {
        name: tf.ensure_shape(features[name], [ids.shape[0], *spec.shape])
        for name, spec in source.element_spec.items()
    }
    return checked(features, label, num_classes)


def checked(features: Features, label: str, num_classes: int | None) -> Features:
    """Returns features that are an error if a label is none of the classes, see `fetch`."""
    labels = features.get(label)
    if num_classes is not None and labels is not None and labels.dtype.is_integer:
        least, greatest = tf.reduce_min(labels), tf.reduce_max(labels)
        message = f'the label {label!r} is not one of the classes 0 to {num_classes - 1}'
        inside = (least >= 0) & (greatest < num_classes)
        with tf.control_dependencies([tf.debugging.Assert(inside, [message])]):
            return {**features, label: tf.identity(labels)}
    return features


def find(
    source: Source, batches: Iterable[np.ndarray], label: str, num_classes: int | None = None
) -> Damage | None:
    """Returns the first damaged record, or None if all can be read.

    Args:
        source, label, num_classes: as for `fetch`.
        batches: record numbers, int64 [B] each; a batch is read at once if that goes well.
    """
    read = _reader(source, label, num_classes)
    for ids in batches:
        try:
            read(ids)
        except ERRORS:
            for record in ids:
                try:
                    read(record[np.newaxis])
                except ERRORS as error:
                    return Damage(int(record), source.where(int(record)), reason(error))
    return None


def fetch_good(
    source: Source, ids: tf.Tensor, label: str, num_classes: int | None = None
) -> tuple[Features, tf.Tensor]:
    """Reads records, and in place of a damaged one the other of its pair (see `mix`) once more.

    Of good examples none is then blended with what depends on how the batch is divided. Where both
    of a pair are damaged they are the first good row of the batch.

    It goes through Python, which takes some 0.3 ms a batch.

    Args:
        source, ids, label, num_classes: as for `fetch`.

    Returns:
        The features, and which rows are good, bool [B]. If none is, the features are zeros.
    """
    spec = source.element_spec
    read = _reader(source, label, num_classes)

    def read_good(ids: np.ndarray) -> list[np.ndarray]:
        try:
            features, good = read(ids), np.ones(len(ids), bool)
        except DAMAGE:
            features, good = _one_at_a_time(source, read, ids)
        # What fills up a batch of an evaluation is one record again and again.
        _, first = np.unique(ids, return_index=True)
        listing.read(source, len(first), int((~good[first]).sum()))
        return [*(np.asarray(features[name]) for name in spec), good]

    dtypes = [each.dtype for each in spec.values()]
    # Without state, or tf.data would make one batch at a time to keep an order in it.
    *tensors, good = tf.numpy_function(read_good, [ids], [*dtypes, tf.bool], stateful=False)
    features = {
        name: tf.ensure_shape(tensor, [ids.shape[0], *spec[name].shape])
        for name, tensor in zip(spec, tensors, strict=True)
    }
    return features, tf.ensure_shape(good, ids.shape)


def note(source: Source, ids: np.ndarray, label: str, num_classes: int | None = None) -> None:
    """Lists the damaged records of a batch that another process has made.

    Args:
        source, label, num_classes: as for `fetch`.
        ids: of the batch; those of damaged records are -2 and less.

    Raises:
        BadRecord: too many are bad.
    """
    bad = [-2 - int(record) for record in ids if record <= -2]
    for record in bad:
        if listing.has(record, source.where(record)):
            continue
        if damage := find(source, [np.array([record])], label, num_classes):
            listing.add(damage)
    listing.read(source, len(set(ids.tolist())), len(set(bad)))


def _reader(
    source: Source, label: str, num_classes: int | None
) -> Callable[[np.ndarray], Features]:
    # TensorFlow never frees a function that calls Python, so one serves all.
    key = id(source), label, num_classes
    _, read = _readers.get(key, (None, None))
    if read is None:
        read = _new_reader(source, label, num_classes)
        if len(_readers) >= _MOST_READERS:
            _readers.pop(next(iter(_readers)), None)
        _readers[key] = source, read
    return read


def _new_reader(
    source: Source, label: str, num_classes: int | None
) -> Callable[[np.ndarray], Features]:
    with tf.init_scope():
        function = tf.function(
            lambda ids: fetch(source, ids, label, num_classes),
            input_signature=[tf.TensorSpec([None], tf.int64)],
            autograph=False,
        ).get_concrete_function()

    def read(ids: np.ndarray) -> Features:
        with tf.device('CPU:0'):
            return {name: v.numpy() for name, v in function(tf.constant(ids, tf.int64)).items()}

    return read


def _one_at_a_time(
    source: Source, read: Callable[[np.ndarray], Features], ids: np.ndarray
) -> tuple[Features, np.ndarray]:
    rows: list[Features | None] = []
    for record in ids:
        try:
            rows.append(read(record[np.newaxis]))
        except DAMAGE as error:
            rows.append(None)
            listing.add(Damage(int(record), source.where(int(record)), reason(error)))
    good = np.array([row is not None for row in rows])
    spare = next((row for row in rows if row is not None), None)
    if spare is None:
        spare = {
            name: np.zeros([1, *spec.shape], spec.dtype.as_numpy_dtype)
            for name, spec in source.element_spec.items()
        }
    filled = []
    for number, row in enumerate(rows):
        pair = rows[number ^ 1 : (number ^ 1) + 1]  # The last one of an odd number has none.
        filled.append(next(each for each in (row, *pair, spare) if each is not None))
    return {name: np.concatenate([row[name] for row in filled]) for name in spare}, good


def reason(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Returns what an operation complains of, without its place in the graph."""
    message = re.sub(
        r'Could not parse example input, value: (?s:.*)', 'no tf.train.Example', text(error)
    )
    first = message.partition('\n')[0] if message else type(error).__name__
    first = re.sub(r'\{\{.*?\}\}|\[\[.*|\[Op:.*', '', first).strip()
    first = re.sub(r'^assertion failed: \[(.*)\]$', r'\1', first).replace("\\'", "'")
    return re.sub(r'^(\w+\.)*(BadRecord|ValueError): ', '', first)


def text(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Returns what an operation says, and begins with the complaint."""
    if isinstance(error, UnicodeDecodeError):
        message = error.object.decode(errors='replace')
    else:
        message = error.message
    # What a function raised that was called and not read through a dataset begins with its place.
    return re.sub(
        r'^Graph execution error:\s+(Detected at node .*\n(\s*File .*\n)*)?', '', message
    ).strip()


@contextlib.contextmanager
def told(
    source: Source,
    batches: Iterable[np.ndarray],
    label: str,
    num_classes: int | None = None,
    *,
    skips: bool = False,
) -> Iterator[None]:
    """Turns the error of a damaged record into a sentence that names it.

    Args:
        source, label, num_classes: as for `fetch`.
        batches: the record numbers that are read in this context; looked at only after an error.
        skips: whether damaged records are left out, by `fetch_good`.

    Raises:
        ConfigError: a record is damaged or, if such are left out, far too many are.
        ReadError: a file is out of reach.
    """
    try:
        yield
    except ERRORS as error:
        unread = _OUT_OF_REACH.search(text(error))
        if unread:
            raise ReadError(unread[1]) from error
        if isinstance(error, _OTHERS):
            raise
        if skips:
            if listing.is_too_much:
                raise ConfigError(listing.complaint()) from error
            raise
        damage = find(source, batches, label, num_classes)
        if damage is None:
            raise
        advice = (
            ", or set Data.on_bad_record = 'skip' to leave such records out. "
            '`phalanx inspect --verify` lists them all.'
        )
        raise ConfigError(
            f'{damage.where} cannot be used: {damage.reason}. Mend the data'
            f'{"." if source.in_order_only else advice}'
        ) from error
