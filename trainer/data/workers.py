"""Batches that other processes make: how a trainer asks data workers, and survives their deaths.

A batch depends on its positions and record numbers alone (see `batch`), so a data worker keeps
nothing between two requests: any of them can answer any request, and answer it again. A trainer
sends the positions and record numbers of one replica's batch and gets its tensors, over gRPC. The
order is decided by the trainer alone.
"""

import dataclasses
import itertools
import os
import queue
import threading
import time
from collections.abc import Collection, Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import bad_records
from trainer.data.batch import Batch, Data, class_label
from trainer.data.protocol import OPTIONS, SERVICE, Task, unpack
from trainer.data.source import Features
from trainer.errors import BadRecord, ConfigError

# The environment variable with the addresses, 'host:port,host:port': where data workers are is no
# property of a run, so it is not configured.
VARIABLE = 'PHALANX_DATA_WORKERS'
# Batches that a trainer asks of each data worker at a time: enough for its processors.
CALLS = 4

_PROGRESS_SECONDS = 10.0
_FIRST_REST_SECONDS, _LONGEST_REST_SECONDS = 0.1, 2.0
# When another data worker is asked for the same batch; the next one after twice as long.
_SLOW_SECONDS = 10.0
# What a data worker says that is there, but does not give what was asked for: a record is damaged,
# it is of another run, or anything else.
_DAMAGED, _REFUSED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
_SETTLING = (grpc.StatusCode.OK, _DAMAGED, _REFUSED, grpc.StatusCode.INTERNAL)


@dataclasses.dataclass(eq=False)
class _Worker:
    """A data worker as this trainer knows it.

    Attributes:
        address: 'host:port'.
        channel: the connection, which mends itself.
        asked: requests that it has not answered.
        failures: in a row.
        rests_until: when it may be asked again, by the monotonic clock.
        hangs: whether it is long about something; it is asked when all others are, too.
    """

    address: str
    channel: grpc.Channel
    asked: int = 0
    failures: int = 0
    rests_until: float = 0.0
    hangs: bool = False


class DataWorkers:
    """The data workers of a run, as one trainer sees them.

    Attributes:
        calls: how many batches are best asked for at a time.
    """

    def __init__(
        self, addresses: Sequence[str], *, config_sha256: str, patience_seconds: float = 300.0
    ):
        """Prepares to ask; nothing is sent yet.

        Args:
            addresses: 'host:port' of each.
            config_sha256: of the configuration, which must be theirs too.
            patience_seconds: how long to wait while none of them answers.

        Raises:
            ConfigError: an address is none.
        """
        for address in addresses:
            if not address.rpartition(':')[0] or not address.rpartition(':')[2].isdigit():
                raise ConfigError(
                    f'The data worker {address!r} is not of the form host:port. {VARIABLE} holds '
                    'their addresses, separated by commas.'
                )
        self._config_sha256, self._patience = config_sha256, patience_seconds
        self._workers = [
            _Worker(address, grpc.insecure_channel(address, OPTIONS)) for address in addresses
        ]
        self._turns, self._lock = itertools.count(), threading.Lock()
        self._failing_since: float | None = None  # None after an answer
        self._met: set[tuple[tuple[str, str], ...]] = set()
        self.calls = CALLS * len(self._workers)

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str] = os.environ, *, config_sha256: str
    ) -> 'DataWorkers | None':
        """Returns the data workers that `VARIABLE` names, None if there are none."""
        addresses = [each.strip() for each in environ.get(VARIABLE, '').split(',')]
        addresses = [each for each in addresses if each]
        return cls(addresses, config_sha256=config_sha256) if addresses else None

    def remote(
        self,
        purpose: str,
        batch: Batch,
        data: Data,
        *,
        seed: int | None = None,
        num_classes: int | None = None,
    ) -> Batch:
        """Returns what does the same as `batch`, but has a data worker do it.

        It waits until there is a data worker.

        Args:
            purpose: 'train' or 'eval'.
            batch: what they compute; here only its shapes and dtypes are looked at.
            data: what is read.
            seed: of augmentation; None if there is none.
            num_classes: as for `batch.train_batch`.

        Raises:
            ConfigError: there is none in time, one runs another configuration, reads other data or
                has other versions of the libraries, or the data is a stream.
        """
        if data.source.in_order_only:
            raise ConfigError(
                'A stream is read from its beginning by every worker itself, so data workers '
                'cannot make its batches. Train without them.'
            )
        task = Task(
            purpose, data, config_sha256=self._config_sha256, seed=seed, num_classes=num_classes
        )
        if task.metadata not in self._met:
            self._meet(task)
            self._met.add(task.metadata)

        def remote_batch(positions: tf.Tensor, ids: tf.Tensor) -> Features:
            arguments = [tf.TensorSpec(ids.shape, tf.int64)] * 2
            function = tf.function(batch, autograph=False).get_concrete_function(*arguments)
            spec = function.structured_outputs
            flat = tf.nest.flatten(spec)
            dtypes = [each.dtype for each in flat]

            def ask(positions: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
                request = positions.astype('<i8').tobytes() + ids.astype('<i8').tobytes()
                arrays = unpack(self._ask(request, task), dtypes)
                if data.on_bad_record == 'skip':
                    made = tf.nest.pack_sequence_as(spec, arrays)
                    bad_records.note(data.source, made['ids'], class_label(data), num_classes)
                return arrays

            # Without state, or tf.data would ask for one batch at a time to keep an order in it.
            tensors = tf.numpy_function(ask, [positions, ids], dtypes, stateful=False)
            shaped = [tf.ensure_shape(t, e.shape) for t, e in zip(tensors, flat, strict=True)]
            return tf.nest.pack_sequence_as(spec, shaped)

        return remote_batch

    def _meet(self, task: Task) -> None:
        """Returns as soon as one data worker is there; none that is there may be of another run."""
        started = told = time.monotonic()
        while True:
            # One is enough, but all are told: any of them may be of another run.
            there = [_told(worker, task) for worker in self._workers]
            if any(there):
                return
            now, names = time.monotonic(), ', '.join(each.address for each in self._workers)
            if now - started > self._patience:
                raise ConfigError(
                    f'No data worker has answered within {self._patience:g} s: {names}. See '
                    'whether they were started (their logs say), and can be reached from here.'
                )
            if now - told > _PROGRESS_SECONDS:
                logging.info('Waiting for a data worker: %s.', names)
                told = now
            time.sleep(_FIRST_REST_SECONDS)

    def _ask(self, request: bytes, task: Task) -> bytes:
        """Returns the answer to a request, whoever gives it.

        Where Python hangs, gRPC still answers pings. So after a while another is asked too.
        """
        calls: dict[grpc.Future, _Worker] = {}  # that are waited for
        ended: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
        patience = _SLOW_SECONDS
        while True:
            if worker := self._choose(calls.values()):
                calls[self._send(worker, request, task, ended)] = worker
            elif not calls:
                self._check_patience()
                time.sleep(_FIRST_REST_SECONDS)
                continue
            try:
                call = ended.get(timeout=patience)
            except queue.Empty:
                for worker in calls.values():
                    worker.hangs = True
                patience *= 2
                continue
            later = list(calls)[list(calls).index(call) + 1 :]
            worker = calls.pop(call)
            if call.code() == grpc.StatusCode.NOT_FOUND:
                # It is another one than it was, and has not been told yet.
                self._tell(worker, task)
            elif call.code() in _SETTLING:
                # Only those: by its answer it is seen that one that was asked before is back.
                for each in later:
                    each.cancel()
                if call.code() == grpc.StatusCode.OK:
                    return call.result()
                raise _as_exception(worker.address, call)

    def _send(
        self, worker: _Worker, request: bytes, task: Task, ended: 'queue.SimpleQueue[grpc.Future]'
    ) -> grpc.Future:
        """Sends a request, and has the call put into `ended` when it has."""

        def end(call: grpc.Future) -> None:
            with self._lock:
                worker.asked -= 1
            if call.code() in (*_SETTLING, grpc.StatusCode.NOT_FOUND):
                self._note(worker)
            elif not call.cancelled():  # By this process.
                self._note(worker, call)
            ended.put(call)

        method = worker.channel.unary_unary(f'/{SERVICE}/batch')
        call = method.future(request, metadata=task.metadata)
        call.add_done_callback(end)
        return call

    def _tell(self, worker: _Worker, task: Task) -> None:
        method = worker.channel.unary_unary(f'/{SERVICE}/task')
        try:
            method(task.text, timeout=_PROGRESS_SECONDS)
        except grpc.RpcError as error:
            if error.code() in _SETTLING:
                raise _as_exception(worker.address, error) from None
            self._note(worker, error)

    def _choose(self, but: Collection[_Worker]) -> _Worker | None:
        """Returns the data worker with the least to do of others than `but`, if one does not rest.

        It counts as asked from now on.
        """
        with self._lock:
            now, turn = time.monotonic(), next(self._turns)
            rested = [each for each in self._workers if each.rests_until <= now and each not in but]
            if not rested:
                return None
            # Those with equally little to do take turns.
            first = turn % len(rested)
            worker = min(rested[first:] + rested[:first], key=lambda each: (each.hangs, each.asked))
            worker.asked += 1
            return worker

    def _check_patience(self) -> None:
        """Raises RuntimeError if all have failed for too long."""
        since = self._failing_since
        silence = 0.0 if since is None else time.monotonic() - since
        if silence > self._patience:
            raise RuntimeError(
                f'No data worker has answered for {silence:.0f} s: '
                f'{", ".join(each.address for each in self._workers)}'
            )

    def _note(self, worker: _Worker, error: grpc.RpcError | None = None) -> None:
        """Notes that a data worker has answered, or has failed to."""
        with self._lock:
            worker.hangs = False
            before, now = worker.failures, time.monotonic()
            if error is None:
                worker.failures, self._failing_since = 0, None
            else:
                self._failing_since = self._failing_since or now
                if worker.rests_until <= now:  # Else others have met with the same failure.
                    rest = min(_LONGEST_REST_SECONDS, _FIRST_REST_SECONDS * 2**before)
                    worker.failures, worker.rests_until = before + 1, now + rest
        if error is None and before:
            logging.info('data worker %s answers again', worker.address)
        if error is not None and not before:
            logging.warning('data worker %s does not answer: %s', worker.address, error.details())


def _told(worker: _Worker, task: Task) -> bool:
    """Tells a data worker what is asked of it; returns whether it is there."""
    try:
        worker.channel.unary_unary(f'/{SERVICE}/task')(task.text, timeout=_PROGRESS_SECONDS)
    except grpc.RpcError as error:
        if error.code() == _REFUSED:
            raise ConfigError(
                f'The data worker {worker.address} would make other batches than this trainer: '
                f'{error.details()}. Start it with the same files, flags, data and versions.'
            ) from None
        if error.code() in _SETTLING:
            raise _as_exception(worker.address, error) from None
        return False
    return True


def _as_exception(address: str, error: grpc.RpcError) -> Exception:
    if error.code() == _DAMAGED:
        return BadRecord(error.details())
    return RuntimeError(f'data worker {address}: {error.details()}')
