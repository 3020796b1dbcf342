"""A data worker: makes the batches that trainers ask for, and keeps nothing between requests."""

import json
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import bad_records
from trainer.data.bad_record_list import listing
from trainer.data.batch import Batch, Data, eval_batch, learnt, train_batch
from trainer.data.protocol import OPTIONS, SERVICE, Task, digest, pack, task_named
from trainer.errors import ConfigError

# An error travels in gRPC's metadata, of which 8 KB arrive for certain, and where a byte may take
# three.
_ERROR_BYTES = 1000
# What the trainers alone know: the number of classes from their model, what was learnt from their
# checkpoint.
_THEIRS = ('num_classes', 'learnt')


def prepare_process(*, threads: int, deterministic: bool) -> None:
    """Makes this process one that does nothing but make batches; call it before any operation.

    Args:
        threads: as for `Server`.
        deterministic: as for `trainer.build_strategy`.
    """
    tf.config.set_visible_devices([], 'GPU')  # They are the trainers'.
    # Batches are made side by side, each by one thread, as in a trainer.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    # Python that a batch calls may call TensorFlow, and that Python again, as where damaged records
    # are left out. Each holds a thread; with too few, all batches would wait for another.
    tf.config.threading.set_inter_op_parallelism_threads(3 * threads + 1)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    listing.leave_to_others()


class Server:
    """Answers requests until it is stopped.

    Attributes:
        address: where it listens.
    """

    def __init__(
        self,
        address: str,
        *,
        train_data: Data,
        eval_data: Data | None,
        seed: int,
        config_sha256: str,
        threads: int,
    ):
        """Starts to listen.

        Args:
            address: 'host:port'. Whoever can reach it can read the data.
            train_data, eval_data, seed: as for `trainer.train`.
            config_sha256: of the configuration, which must be that of the trainers.
            threads: how many batches are made side by side.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._data, self._seed = {'train': train_data, 'eval': eval_data}, seed
        self._config_sha256 = config_sha256
        self._makers: dict[str, Callable] = {}  # by the digests of their tasks
        methods = {'task': self._take, 'batch': self._make}
        handler = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(_answering(method))
                for name, method in methods.items()
            },
        )
        # Two servers on one port would share its connections.
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads),
            handlers=[handler],
            options=[*OPTIONS, ('grpc.so_reuseport', 0)],
        )
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f'A data worker cannot listen on {address!r}: {error}') from None
        self.address = f'{address.rpartition(":")[0]}:{port}'
        self._server.start()

    def wait(self) -> None:
        """Returns when it has been stopped."""
        self._server.wait_for_termination()

    def stop(self) -> None:
        """Ends it, with what it is at."""
        self._server.stop(None).wait()

    def _take(self, request: bytes, task: str | None) -> bytes:
        """Takes a task, if it is of this run."""
        del task
        theirs = json.loads(request)
        purpose, num_classes = theirs['purpose'], theirs['num_classes']
        data = self._data.get(purpose)
        if data is None:
            raise _Refusal(f'it has no data for {purpose!r}')
        seed = self._seed if purpose == 'train' else None
        ours = Task(purpose, data, config_sha256=self._config_sha256, seed=seed)
        _check_same(ours.parts, theirs)
        data = learnt(data, theirs['learnt'])
        if purpose == 'train':
            batch = train_batch(data, seed=seed, num_classes=num_classes)
        else:
            batch = eval_batch(data, num_classes=num_classes)
        self._makers.setdefault(digest(request), _maker(batch))
        return b''

    def _make(self, request: bytes, task: str | None) -> bytes:
        """Makes a batch of positions and record numbers, int64 little-endian."""
        if task not in self._makers:
            raise _UnknownTask('tell the task first')
        positions, ids = np.frombuffer(request, '<i8').astype(np.int64).reshape(2, -1)
        made = self._makers[task](tf.constant(positions), tf.constant(ids))
        return pack([tensor.numpy() for tensor in made])


class _Refusal(Exception):
    """A task is of another run."""


class _UnknownTask(Exception):
    """A task has not been taken."""


_CODES = {
    _Refusal: grpc.StatusCode.FAILED_PRECONDITION,
    _UnknownTask: grpc.StatusCode.NOT_FOUND,
    **dict.fromkeys(bad_records.DAMAGE, grpc.StatusCode.INVALID_ARGUMENT),
}


def _answering(method: Callable[[bytes, str | None], bytes]) -> Callable[[bytes, Any], bytes]:
    """Returns a handler of gRPC, which tells the trainer what went wrong."""

    def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return method(request, task_named(context.invocation_metadata()))
        except Exception as error:
            code = _CODES.get(type(error), grpc.StatusCode.INTERNAL)
            of_operation = isinstance(error, bad_records.ERRORS)
            text = bad_records.text(error) if of_operation else str(error)
            if code == grpc.StatusCode.INTERNAL:
                logging.exception('A request could not be answered.')
                text = f'{type(error).__name__}: {text}'
        context.set_code(code)
        text = text.encode(errors='replace')[:_ERROR_BYTES].decode(errors='ignore')
        context.set_details(text)
        return b''

    return handler


def _maker(batch: Batch) -> Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]:
    return tf.function(
        lambda positions, ids: tf.nest.flatten(batch(positions, ids)), autograph=False
    )


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    different = [name for name in ours if name not in _THEIRS and theirs.get(name) != ours[name]]
    if different:
        values = [f'{name} is {ours[name]} there, {theirs.get(name)} here' for name in different]
        raise _Refusal('; '.join(values))
