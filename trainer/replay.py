"""One step of a run again, looked at from within: its batch, its loss, its gradients."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer import canonical, proof, schedule
from trainer.checkpoint import CheckpointDamaged, Checkpoints, check_unchanged, state_sha256
from trainer.data.batch import Data, batch_spec, learnt
from trainer.data.pipeline import train_batches
from trainer.debugger import in_debugger
from trainer.divergence import LeftOut
from trainer.errors import ConfigError
from trainer.groups import Group
from trainer.interval import epoch_steps, parse_steps
from trainer.model_dir import ModelDir
from trainer.numerics import Finding, Operation, Watch, some
from trainer.objective import Objective, WholeStep
from trainer.preflight import check_batch_size
from trainer.remat import rematerialise
from trainer.state import build_state
from trainer.sums import Metrics
from trainer.warm_start import WarmStart, begin_with
from trainer.watched_step import Gradient, WatchedStep, eagerly

# Of the variables of a large model only so many are worth a line.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a step did.

    Attributes:
        step: which one, counted from 1.
        start: the step of the checkpoint it was reached from; 0 for the initial state.
        records: of each replica, the record numbers of its examples, int64 [rows].
        finite: whether the step was taken; one that is not finite is skipped.
        loss: of the global batch.
        gradient_norm: over all variables, before clipping.
        gradients: of each variable that has one, those that are not finite first, then the largest.
        state_sha256: of the state after the step, as in its checkpoint.
        saved_sha256: what the run's own checkpoint of this step says, if there is one.
        difference: the largest difference of any number of the state after the eager step.
        finding: where in the forward pass something was not finite first.
        operation: the operation that was the first to go wrong, if it could be told.
        nearest: among the variables whose gradients are not finite, the one nearest to the loss.
        rolled_back: whether this step had read other data before a roll-back.
    """

    step: int
    start: int
    records: list[np.ndarray]
    finite: bool
    loss: float
    gradient_norm: float
    gradients: list[Gradient]
    state_sha256: str
    saved_sha256: str | None
    difference: float
    finding: Finding | None
    operation: Operation | None
    nearest: str | None
    rolled_back: bool = False

    def __str__(self) -> str:
        begin = f'the checkpoint of step {self.start}' if self.start else 'the initial state'
        lines = [f'step {self.step}, reached from {begin}']
        if self.rolled_back:
            lines.append(
                'before a roll-back it read other records; the log of the chief names those of the '
                'bad steps'
            )
        lines.append('records')
        for index, ids in enumerate(self.records):
            lines.append(f'  replica {index}: {" ".join(map(str, ids))}')
        lines += [f'loss {self.loss:.6g}', f'gradient norm {self.gradient_norm:.6g}']
        for each in self.gradients[:_SHOWN]:
            bad = f'  ({each.bad} of its numbers are not finite)' if each.bad else ''
            lines.append(f'  {each.norm:<12.6g} {each.path}{bad}')
        if len(self.gradients) > _SHOWN:
            lines.append(f'  and {len(self.gradients) - _SHOWN} more variables')
        return '\n'.join([*lines, *(self._taken() if self.finite else self._skipped())])

    def _taken(self) -> list[str]:
        lines = [f'state sha256 after step {self.step}: {self.state_sha256}']
        if self.saved_sha256:
            same = 'the same' if self.saved_sha256 == self.state_sha256 else self.saved_sha256
            lines.append(f'its checkpoint says: {same}')
        away = f'at most {self.difference:.1e} away' if self.difference else 'with the same bits'
        lines.append(f'the eager step, whose kernels may round differently, ends {away}')
        return lines

    def _skipped(self) -> list[str]:
        lines = ['not finite, so the step was skipped. First']
        if self.finding:
            lines.append(f'  in the forward pass: {self.finding}')
        if self.operation:
            lines.append(f'  by the operation: {self.operation}')
        if self.nearest:
            lines.append(f'  in the gradient, seen from the loss: {self.nearest}')
        if len(lines) == 1:
            lines.append('  in no layer and no gradient: the compiled step alone overflows')
        return lines


def replay(
    *,
    strategy: tf.distribute.Strategy,
    model_dir: str,
    step: int,
    model: Callable[[], keras.Model],
    optimizer: Callable[[], keras.optimizers.Optimizer],
    loss: Callable | Mapping[str, Callable],
    train_data: Data,
    steps: int | str,
    batch_size: int,
    metrics: Metrics = (),
    groups: Sequence[Group | Sequence[Group]] = (),
    seed: int = 0,
    precision: str = 'float32',
    accumulate: int = 1,
    canonical_shards: int | None = None,
    train_step: Callable | None = None,
    remat: Sequence[str] = (),
    jit_compile: bool = False,
    warm_start: WarmStart | None = None,
    allow_changes: Sequence[str] = (),
    oldest: int = 0,
    debug: bool = False,
) -> Replay:
    """Takes one step of a run again, first as in training and then eagerly, looking at all of it.

    The state before the step is reached from the nearest good checkpoint, by compiled steps. The
    step itself is taken twice from there: compiled, which gives the bits of training, and as plain
    Python, which can be looked at and differs by rounding. Nothing in `model_dir` is changed, and
    the run may be going on meanwhile.

    Args:
        strategy: where; with as many replicas as the run had, or the bits differ.
        model_dir: of the run.
        step: which one, from 1 to the length of the run.
        model, optimizer, loss, train_data, steps, batch_size, metrics, groups, seed, precision,
            accumulate, canonical_shards, train_step, remat, jit_compile, warm_start,
            allow_changes: what `trainer.train` was given.
        oldest: no checkpoint of an earlier step will do, as the run was another one then.
        debug: whether the eager step runs under pdb, with a breakpoint in the model's `call`.

    Returns:
        What the step did.

    Raises:
        ConfigError: the run has no such step, or its checkpoints are of another run.
    """
    objective, replicas = Objective(loss), strategy.num_replicas_in_sync
    if canonical_shards is not None:
        canonical.check(canonical_shards, replicas)
    check_batch_size(batch_size, canonical_shards or replicas, accumulate)
    steps_per_epoch = epoch_steps(train_data.source.num_examples, batch_size)
    last_step = parse_steps(steps, steps_per_epoch)
    if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= last_step:
        raise ConfigError(
            f'There is no step {step!r} to replay: the steps of this run are 1 to {last_step}.'
        )
    identity = {
        'seed': seed,
        'global_batch_size': batch_size,
        'num_examples': train_data.source.num_examples,
        'data_fingerprint': train_data.source.fingerprint,
    }
    checkpoints = Checkpoints(ModelDir(model_dir).checkpoints, writer=False)
    train_data = learnt(train_data, checkpoints.newest_manifest().get('preprocess'))
    spec = batch_spec(train_data)['inputs']
    state = build_state(
        strategy, model, optimizer, spec, groups=groups, seed=seed, precision=precision
    )
    schedule.bind(state.optimizers, last_step, steps_per_epoch)
    rematerialise(state.model, remat)
    objective = objective if train_step is None else WholeStep(train_step)
    objective.find_names(strategy, state, batch_spec(train_data, batch_size // replicas))
    start, tensors, manifest = _nearest(checkpoints, step, oldest)
    if start:
        check_unchanged(manifest, identity, allow_changes)
        state.restore(tensors)
    elif warm_start is not None:
        begin_with(warm_start, state)

    left_out = _left_out(checkpoints)

    def batches(first: int):
        return train_batches(
            train_data,
            strategy,
            seed=seed,
            global_batch_size=batch_size,
            start_step=first,
            left_out=left_out.windows,
        )

    watch = Watch()
    watched_step = WatchedStep(
        watch,
        strategy,
        state,
        objective,
        metrics,
        seed=seed,
        accumulate=accumulate,
        canonical_shards=canonical_shards,
        jit_compile=jit_compile,
    )
    compiled = batches(start)
    if step - 1 > start:
        logging.info('taking steps %d to %d first', start + 1, step - 1)
        watched_step.run(compiled, step - 1 - start)
    before = state.snapshot()
    totals = watched_step.run(compiled, 1)
    after = state.snapshot()
    finite = bool(totals['finite_steps'])

    state.restore(before)
    batch = next(batches(step - 1))
    with eagerly(), watch.layers(state.model), watched_step.watched_loss():
        run = in_debugger(state.model, watched_step.run, step) if debug else watched_step.run
        run(iter([batch]), 1)
    loss_value, norm = watched_step.loss_and_norm
    if finite:
        loss_value, norm = float(totals['loss']), float(totals['gradient_norm'])
    return Replay(
        step=step,
        start=start,
        records=[ids.numpy() for ids in strategy.experimental_local_results(batch['ids'])],
        finite=finite,
        loss=loss_value,
        gradient_norm=norm,
        gradients=watched_step.gradients,
        state_sha256=state_sha256(after),
        saved_sha256=_saved(checkpoints.path(step)),
        difference=_difference(after, state.snapshot()),
        finding=None if finite or not watch.findings else watch.findings[0],
        operation=None if finite else watch.cause(),
        nearest=_nearest_to_loss(watched_step.gradients, watch.order()),
        rolled_back=any(step * batch_size > first for first, _ in left_out.windows),
    )


def _nearest(
    checkpoints: Checkpoints, step: int, oldest: int
) -> tuple[int, Mapping[str, np.ndarray], Mapping]:
    """The newest good checkpoint before a step, and what it holds; 0 where there is none."""
    for start in reversed([each for each in checkpoints.steps() if oldest <= each < step]):
        try:
            return (start, *checkpoints.read(start))
        except CheckpointDamaged as error:
            logging.warning('%s It is left out.', error)
        except ConfigError:
            if start in checkpoints.steps():
                raise
            # The run has deleted it meanwhile.
    if oldest:
        raise ConfigError(
            f'Step {step} cannot be reached: its configuration holds from step {oldest} on, and no '
            f'good checkpoint from there is left. There are: '
            f'{some(checkpoints.steps()) or "none"}. Replay a step after one of these.'
        )
    return 0, {}, {}


def _left_out(checkpoints: Checkpoints) -> LeftOut:
    """What the run as it has come to be does not read; a roll-back is told by later checkpoints."""
    manifest = checkpoints.newest_manifest()
    return LeftOut.of(manifest) if manifest else LeftOut()


def _saved(directory: Path) -> str | None:
    try:
        return proof.read_manifest(directory)['state_sha256']
    except (CheckpointDamaged, ConfigError):
        return None


def _difference(one: Mapping[str, tf.Tensor], other: Mapping[str, tf.Tensor]) -> float:
    pairs = [(a.numpy().astype(np.float64), other[path].numpy()) for path, a in one.items()]
    return max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs)


def _nearest_to_loss(gradients: Sequence[Gradient], order: Mapping[str, int]) -> str | None:
    bad = [each.path for each in gradients if each.bad]
    return max(bad, key=lambda path: order.get(path, -1)) if bad else None
