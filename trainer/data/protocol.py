"""What trainers and data workers say to each other over gRPC: tasks, and tensors as bytes."""

import hashlib
import json
import struct
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer import version
from trainer.data.batch import Data, learnt_state

SERVICE = 'phalanx.DataWorker'
# Messages may have any size. A peer that is frozen or cut off counts as gone after 20 seconds,
# however long a batch may take to make.
OPTIONS = (
    ('grpc.max_send_message_length', -1),
    ('grpc.max_receive_message_length', -1),
    ('grpc.keepalive_time_ms', 10_000),
    ('grpc.keepalive_timeout_ms', 10_000),
    ('grpc.http2.max_pings_without_data', 0),
    ('grpc.http2.max_ping_strikes', 0),
    ('grpc.enable_http_proxy', 0),
    ('grpc.min_reconnect_backoff_ms', 1_000),
    ('grpc.initial_reconnect_backoff_ms', 100),
    ('grpc.max_reconnect_backoff_ms', 1_000),
)
_TASK_KEY = 'phalanx-task'


class Task:
    """All that a batch depends on besides positions and record numbers.

    A data worker is told it once; requests name it by a digest.

    Attributes:
        parts: what it consists of, by name.
        text: the same as JSON, in bytes.
        metadata: what requests carry, as gRPC's metadata.
    """

    def __init__(
        self,
        purpose: str,
        data: Data,
        *,
        config_sha256: str,
        seed: int | None = None,
        num_classes: int | None = None,
    ):
        """Describes a task.

        Args:
            purpose: 'train' or 'eval'.
            data: what is read.
            config_sha256: of the configuration, which says what is done to it.
            seed: of augmentation; None if there is none.
            num_classes: as for `batch.train_batch`.
        """
        self.parts = {
            'purpose': purpose,
            'config_sha256': config_sha256,
            'data_fingerprint': data.source.fingerprint,
            'seed': seed,
            'versions': version.versions(),
            'num_classes': num_classes,
            'learnt': learnt_state(data),
        }
        self.text = json.dumps(self.parts, sort_keys=True).encode()
        self.metadata = ((_TASK_KEY, digest(self.text)),)


def digest(task: bytes) -> str:
    """Returns what names a task: the sha256 of its text, in hex digits."""
    return hashlib.sha256(task).hexdigest()


def task_named(metadata: Sequence[tuple[str, str]]) -> str | None:
    """Returns the digest of the task that a request is about."""
    return dict(metadata).get(_TASK_KEY)


def pack(arrays: Sequence[np.ndarray]) -> bytes:
    """Returns arrays as bytes: their shapes and lengths, then the elements of one after another."""
    parts = []
    for array in arrays:
        if array.dtype == object:  # Texts have no fixed length.
            parts.append(tf.make_tensor_proto(array, tf.string).SerializeToString())
        else:
            parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    shapes = [array.shape for array in arrays]
    header = json.dumps([shapes, [len(part) for part in parts]]).encode()
    return b''.join([struct.pack('<I', len(header)), header, *parts])


def unpack(packed: bytes, dtypes: Sequence[tf.DType]) -> list[np.ndarray]:
    """Returns the arrays of `pack`, which lie in the bytes as they came.

    Raises:
        ValueError: the bytes do not fit the dtypes.
    """
    offset = 4 + struct.unpack_from('<I', packed)[0]
    shapes, lengths = json.loads(packed[4:offset])
    arrays = []
    for dtype, shape, length in zip(dtypes, shapes, lengths, strict=True):
        if dtype == tf.string:
            proto = tf.make_tensor_proto('')
            proto.ParseFromString(packed[offset : offset + length])
            arrays.append(tf.make_ndarray(proto))
        else:
            element = np.dtype(dtype.as_numpy_dtype)
            flat = np.frombuffer(packed, element, length // element.itemsize, offset)
            arrays.append(flat.reshape(shape))
        offset += length
    return arrays
