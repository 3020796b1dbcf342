"""Evaluation: every example exactly once, in the training loop, by itself, or beside a run."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.checkpoint import Checkpoints
from trainer.data.batch import PADDING, Data, bad_records_told, batch_spec, learnt
from trainer.data.pipeline import eval_batches
from trainer.data.workers import DataWorkers
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir
from trainer.objective import Objective
from trainer.observe import phases
from trainer.observe.tensorboard import TensorBoard
from trainer.preflight import check_labels
from trainer.state import State, build_state
from trainer.sums import Metrics, MetricSums, first_replica, hide, weigh

_STEPS_PER_CALL = 100
_POLL_SECONDS = 2.0


class EvalStep:
    """Evaluates batches on all replicas, padding left out by its weight of 0.

    Args:
        strategy: the strategy `state` was built under.
        state: the model that is evaluated; nothing is changed.
        objective, metrics: as for `TrainStep`.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        state: State,
        objective: Objective,
        metrics: Metrics = (),
    ):
        self._strategy, self._state, self._objective = strategy, state, objective
        self._metrics = MetricSums(metrics)

    def results(self, sums: tf.Tensor) -> dict[str, float]:
        """Turns what `run` returned, summed over calls, into the loss and the metrics."""
        penalty, batches, _ = (float(v) for v in sums[:3])
        named = len(self._objective.names)
        totals, weights = (np.array(v) for v in (sums[3 : 3 + named], sums[3 + named :][:named]))
        losses = totals / np.maximum(weights, 1e-30)
        return {
            'loss': float(losses.sum()) + penalty / max(batches, 1.0),
            **self._objective.results(losses),
            **self._metrics.results(sums[3 + 2 * named :]),
        }

    @tf.function(reduce_retracing=True)
    def run(self, iterator, num_steps: tf.Tensor) -> tf.Tensor:
        """Evaluates `num_steps` global batches.

        Returns:
            float64 sums, equal on all workers: penalties, batches, examples (those that are not
            padding), each loss, the weight of each loss, and the variables of the metrics.
        """
        named = len(self._objective.names)
        sums = tf.zeros([3 + 2 * named + sum(self._metrics.sizes)], tf.float64)
        for _ in tf.range(num_steps):
            out = self._strategy.run(self._replica, args=(next(iterator),))
            sums += tf.cast(first_replica(self._strategy, out), tf.float64)
        return sums

    def _replica(self, batch):
        context = tf.distribute.get_replica_context()
        state, batch = self._state, hide(batch)
        values = (
            [tf.convert_to_tensor(v.value) for v in variables]
            for variables in (state.evaluated, state.moving, state.seeds)
        )
        inputs = {name: batch[name] for name in batch if name != 'ids'}
        found, _, penalties = state.call(
            lambda: self._objective(state.model, inputs, training=False), *values
        )
        weighed = [weigh(values, batch['weights'], mask) for values, mask in found.losses.values()]
        losses, weights = zip(*weighed, strict=True)
        share = 1.0 / self._strategy.num_replicas_in_sync
        penalty = tf.add_n([tf.zeros([]), *[tf.cast(p, tf.float32) for p in penalties]]) * share
        examples = tf.reduce_sum(tf.cast(batch['ids'] != PADDING, tf.float32))
        metrics = self._metrics.increments(batch.get('labels'), found.outputs, batch['weights'])
        sums = [tf.stack([penalty, share, examples, *losses, *weights]), *metrics]
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(sums, 0))


class Evaluation:
    """Evaluates a state on a whole data set, as often as it is called.

    Args:
        strategy: the strategy `state` was built under; all workers call together.
        state: the model.
        objective, metrics: as for `TrainStep`.
        data: what is evaluated.
        global_batch_size: examples per step over all replicas.
        data_workers: who makes the batches; None makes them here.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        state: State,
        objective: Objective,
        metrics: Metrics,
        data: Data,
        global_batch_size: int,
        data_workers: DataWorkers | None = None,
    ):
        self._num_classes = check_labels(data, objective.loss, state.output_spec)
        self._strategy, self._data, self._batch_size = strategy, data, global_batch_size
        self._objective = objective
        self._data_workers = data_workers
        self._step = EvalStep(strategy, state, objective, metrics)
        self._batches: tuple[Iterator, int] | None = None  # at the beginning of a pass

    def __call__(self, max_steps: int | None = None) -> dict[str, float]:
        """Returns 'loss' and the metrics over all examples (or the first `max_steps` batches).

        Raises:
            RuntimeError: the number of examples seen is not that of the data set.
        """
        batches = self._batches or eval_batches(
            self._data,
            self._strategy,
            global_batch_size=self._batch_size,
            num_classes=self._num_classes,
            workers=self._data_workers,
        )
        # After half a pass, or one that fails, nobody else can begin with these.
        self._batches, (iterator, num_steps) = None, batches
        last = num_steps if max_steps is None else min(num_steps, max_steps)
        total = 0.0
        for first in range(0, last, _STEPS_PER_CALL):
            steps = range(first, min(first + _STEPS_PER_CALL, last))
            phases.enter('evaluating')
            with bad_records_told(self._data, self._records(steps), self._num_classes):
                total += self._step.run(iterator, tf.constant(len(steps), tf.int64))
        if last == num_steps:
            # New ones would leave memory behind: what of them calls Python is never freed.
            self._batches = batches
        named = len(self._objective.names)
        if not any(total[3 + named : 3 + 2 * named]):
            raise ConfigError('The examples of the evaluation weigh nothing at all.')
        seen, expected = int(total[2]), self._data.source.num_examples
        if max_steps is None and seen != expected:
            raise RuntimeError(f'Evaluation saw {seen} examples of {expected}.')
        return self._step.results(total)

    def _records(self, steps: range) -> Iterator[np.ndarray]:
        for step in steps:
            records = step * self._batch_size + np.arange(self._batch_size)
            yield records[records < self._data.source.num_examples]


def evaluate(
    *,
    strategy: tf.distribute.Strategy,
    model_dir: str,
    model: Callable[[], keras.Model],
    loss: Callable | Mapping[str, Callable],
    eval_data: Data | None,
    batch_size: int,
    metrics: Metrics = (),
    precision: str = 'float32',
    step: int | Literal['best'] | None = None,
    follow: bool = False,
    follow_seconds: float = 600.0,
) -> dict[str, float]:
    """Evaluates a checkpoint, or every checkpoint that a running job commits.

    Args:
        strategy: where to evaluate; may differ from the one that trained.
        model_dir: of the run.
        model, loss, metrics, precision: as for `trainer.train`.
        eval_data: what is evaluated.
        batch_size: global batch size.
        step: the checkpoint's step; None takes the newest, 'best' the one with the best metric.
        follow: go on with each newer checkpoint until the run's last step has been evaluated or
            no new checkpoint has come for `follow_seconds`; results go to TensorBoard.
        follow_seconds: patience, in seconds.

    Returns:
        The last evaluation's loss and metrics.

    Raises:
        ConfigError: there is no such checkpoint, or it is of another model, or there are no data.
    """
    if eval_data is None:
        raise ConfigError('There is nothing to evaluate on: EVAL_DATA is None. Set it.')
    objective = Objective(loss)
    checkpoints = Checkpoints(ModelDir(model_dir).checkpoints, writer=False)
    eval_data = learnt(eval_data, checkpoints.newest_manifest().get('preprocess'))
    state = build_state(strategy, model, None, batch_spec(eval_data)['inputs'], precision=precision)
    share = batch_size // strategy.num_replicas_in_sync
    objective.find_names(strategy, state, batch_spec(eval_data, share))
    evaluation = Evaluation(strategy, state, objective, metrics, eval_data, batch_size)
    if not follow:
        step, _ = _restore(state, checkpoints, step)
        return _evaluated(evaluation, step)
    directory = ModelDir(model_dir).eval
    board = TensorBoard(directory, resume_step=sys.maxsize)
    done, results, deadline = -1, {}, time.monotonic() + follow_seconds
    while time.monotonic() < deadline:
        steps = checkpoints.steps()
        if steps and steps[-1] < done:
            # The run has gone back; what was found beyond is of another history.
            board.close()
            board, done = TensorBoard(directory, resume_step=steps[-1] - 1), -1
        new = [s for s in steps if s > done]
        if not new:
            time.sleep(_POLL_SECONDS)
            continue
        try:
            # The newest: a side-car that is slower than the run skips rather than lags behind.
            done, manifest = _restore(state, checkpoints, new[-1])
        except ConfigError:
            if new[-1] in checkpoints.steps():
                raise
            continue  # Deleted meanwhile, for there are newer ones.
        results = _evaluated(evaluation, done)
        board.scalars(done, results)
        board.flush()
        deadline = time.monotonic() + follow_seconds
        if done >= manifest.get('last_step', float('inf')):
            break
    board.close()
    return results


def _restore(
    state: State, checkpoints: Checkpoints, step: int | None
) -> tuple[int, dict[str, Any]]:
    step = checkpoints.choose(step)
    tensors, manifest = checkpoints.read(step)
    state.restore(tensors)
    return step, manifest


def _evaluated(evaluation: Evaluation, step: int) -> dict[str, float]:
    results = evaluation()
    logging.info('evaluation of step %d: %s', step, results)
    return results
