"""The training run, from top to bottom: what is built, where it resumes, and the loop."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer import canonical, schedule, version
from trainer.agreement import Agreement
from trainer.checkpoint import Checkpoints, Keep, check_unchanged, state_sha256
from trainer.cluster import Cluster
from trainer.data.bad_record_list import listing
from trainer.data.batch import Data, bad_records_told, batch_spec, learnt, learnt_state
from trainer.data.pipeline import train_batches, train_records
from trainer.data.workers import DataWorkers
from trainer.divergence import BadSteps, Divergence, LeftOut
from trainer.early_stop import EarlyStop, Progress
from trainer.errors import ConfigError, Diverged, Preempted
from trainer.evaluate import Evaluation
from trainer.groups import Group
from trainer.interval import Every, epoch_steps, parse_steps
from trainer.model_dir import ModelDir
from trainer.objective import Objective, WholeStep
from trainer.observe import phases
from trainer.observe.report import Report
from trainer.preflight import (
    check_batch_size,
    check_eval_data,
    check_labels,
    check_layers,
    check_metrics,
    measured,
)
from trainer.remat import rematerialise
from trainer.resume import tell_changes
from trainer.state import build_state
from trainer.step import TrainStep
from trainer.stop import StopRequest
from trainer.strategy import topology
from trainer.sums import Metrics, MetricSums
from trainer.warm_start import WarmStart, begin_with

# The host comes back to Python about this often: to log, to save, to hear a signal.
SECONDS_PER_CALL = 1.0


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last step taken.
        metrics: of the last log and evaluation, named 'train/loss', 'eval/accuracy', ...
        state_sha256: of the final state; equal for equal runs on one topology.
        checkpoint: directory of the final checkpoint.
        sample_sha256: of the order in which examples were read, if it was logged.
    """

    step: int
    metrics: dict[str, float]
    state_sha256: str
    checkpoint: Path
    sample_sha256: str | None = None


def train(
    *,
    strategy: tf.distribute.Strategy,
    cluster: Cluster,
    model_dir: str,
    model: Callable[[], keras.Model],
    optimizer: Callable[[], keras.optimizers.Optimizer],
    loss: Callable | Mapping[str, Callable],
    train_data: Data,
    steps: int | str,
    batch_size: int,
    metrics: Metrics = (),
    groups: Sequence[Group | Sequence[Group]] = (),
    eval_data: Data | None = None,
    seed: int = 0,
    precision: str = 'float32',
    accumulate: int = 1,
    canonical_shards: int | None = None,
    train_step: Callable | None = None,
    remat: Sequence[str] = (),
    jit_compile: bool = False,
    run_eagerly: bool = False,
    divergence: Divergence | None = None,
    early_stop: EarlyStop | None = None,
    log_every: int | str = 100,
    save_every: int | str = '5 minutes',
    eval_every: int | str | None = None,
    histograms_every: int | str | None = None,
    keep: Keep | None = None,
    asynchronous_saves: bool = True,
    warm_start: WarmStart | None = None,
    allow_changes: Sequence[str] = (),
    sample_log: bool = False,
    max_steps: int | None = None,
    config: Callable[[], str] = str,
    data_workers: DataWorkers | None = None,
) -> Result:
    """Trains until `steps`, from the newest good checkpoint in `model_dir` if there is one.

    Every worker of the cluster calls this with the same arguments. The chief writes; all read.

    Args:
        strategy: where to train, from `trainer.build_strategy`.
        cluster: which worker this is.
        model_dir: where everything is written: a POSIX directory all workers share.
        model: a function or class returning a `keras.Model`; called in the strategy's scope.
        optimizer: likewise, a Keras optimizer. Its clipping acts on reduced gradients.
        loss: a `keras.losses.Loss`; a function (labels, outputs) -> one value an example; a dict
            of these, one for each output; or a function (model, batch, training) -> losses. See
            `trainer.objective.Objective`.
        train_data: what is trained on.
        steps: length of the whole run, in steps or as '12 epochs'.
        batch_size: global batch size, over all replicas of all workers.
        metrics: Keras metrics, of training and evaluation; or a dict, output -> metrics.
        groups: variables that are trained in another way than the rest; the first group that
            matches a variable decides.
        eval_data: what is evaluated, at `eval_every` and at the end; None evaluates nothing.
        seed: of initial weights, sample order, augmentation and dropout.
        precision: 'float32', 'bfloat16', or 'float16' with a dynamic loss scale.
        accumulate: micro-batches a replica splits its batch into, to save memory.
        canonical_shards: sums in an order that is the same for 1, 2, 4 ... up to so many replicas,
            which then end with the same bits. See `trainer.canonical`.
        train_step: a function (model, weights, batch) -> (losses, gradients) in place of `loss`,
            which then serves evaluation alone. See `trainer.objective.WholeStep`.
        remat: patterns of names of layers whose activations are computed again, to save memory.
        jit_compile: whether XLA compiles the forward and backward pass.
        run_eagerly: whether steps run as plain Python, for a debugger.
        divergence: when to go back to a checkpoint and leave out the data that may be the cause;
            the default is `Divergence()`.
        early_stop: when to end before `steps`; None never does.
        log_every, save_every, eval_every, histograms_every: in steps, or as '2 epochs',
            '10 minutes', '30 seconds'. All but histograms also happen at the end.
        keep: which checkpoints are kept; the default is `Keep()`. With `Keep.best` a checkpoint
            is also saved at every step at which its metric is measured.
        asynchronous_saves: whether a thread writes checkpoints while training goes on.
        warm_start: which weights a new run begins with; a resumed one has its own.
        allow_changes: what may differ from the checkpoint: 'seed', 'global_batch_size',
            'num_examples', 'data_fingerprint'.
        sample_log: whether the record numbers of every batch are written to samples.tsv.
        max_steps: end after so many steps in this call, and every evaluation after so many
            batches, as if they were all; for rehearsals.
        config: returns the text of the configuration, for the record; called when all is built.
        data_workers: other processes that make the batches; None makes them in this one.

    Returns:
        How the run ended.

    Raises:
        ConfigError: a mistake in the arguments, the data, or the directory.
        WriteError: the disk is full, or so many saves have failed that work may be lost.
        Diverged: too many steps in a row were not finite, and it could not go back any more.
        Preempted: the process got SIGTERM or SIGINT; the state is saved.
    """
    # ---- What is asked for.
    objective = Objective(loss)
    replicas = strategy.num_replicas_in_sync
    if canonical_shards is not None:
        canonical.check(canonical_shards, replicas)
    check_batch_size(batch_size, canonical_shards or replicas, accumulate)
    steps_per_epoch = epoch_steps(train_data.source.num_examples, batch_size)
    last_step = parse_steps(steps, steps_per_epoch)
    identity = {
        'seed': seed,
        'global_batch_size': batch_size,
        'num_examples': train_data.source.num_examples,
        'data_fingerprint': train_data.source.fingerprint,
    }
    keep, divergence = keep or Keep(), divergence or Divergence()
    dirs = ModelDir(model_dir)
    agreement = Agreement(strategy, cluster)

    with contextlib.ExitStack() as stack:
        stack.enter_context(dirs.full_disk_is_told())
        stack.callback(tf.config.run_functions_eagerly, tf.config.functions_run_eagerly())
        tf.config.run_functions_eagerly(run_eagerly)

        # ---- What is trained.
        phases.enter('building')
        stop = stack.enter_context(StopRequest())
        checkpoints = Checkpoints(
            dirs.checkpoints,
            keep=keep,
            asynchronous=asynchronous_saves,
            writer=cluster.is_chief,
            way_back=2 * divergence.bad_steps,
        )
        # What was learnt from the data when the run began holds to its end, and for evaluation.
        train_data = learnt(train_data, checkpoints.newest_manifest().get('preprocess'))
        preprocess = learnt_state(train_data)
        if eval_data is not None:
            eval_data = learnt(eval_data, preprocess)
            check_eval_data(train_data, eval_data)

        def what_is_read() -> str:
            read = [identity, eval_data and eval_data.source.fingerprint, preprocess]
            return hashlib.sha256(json.dumps(read).encode()).hexdigest()

        agreement.check_same(
            'what is read',
            what_is_read,
            'All workers must see the same files: give paths that all share, or equal copies.',
        )
        state = build_state(
            strategy,
            model,
            optimizer,
            batch_spec(train_data)['inputs'],
            groups=groups,
            seed=seed,
            precision=precision,
        )
        schedule.bind(state.optimizers, last_step, steps_per_epoch)
        rematerialise(state.model, remat)
        if train_step is not None and precision == 'float16':
            raise ConfigError(
                "train.train_step computes gradients itself, so float16's loss scale cannot be "
                "put before them. Set PRECISION = 'bfloat16'."
            )
        trained = objective if train_step is None else WholeStep(train_step)
        # Mostly one and the same. In this order on all workers, as collectives are numbered.
        for each in dict.fromkeys((trained, objective)):
            each.find_names(strategy, state, batch_spec(train_data, batch_size // replicas))
        num_classes = check_labels(train_data, loss, state.output_spec)
        names = [['loss', *each.results([0.0] * len(each.names))] for each in (trained, objective)]
        known = measured(*names, MetricSums(metrics).names, eval_data is not None)
        check_metrics(keep, early_stop, known)
        check_layers(
            state.model,
            replicas,
            jit_compile=jit_compile,
            canonical=canonical_shards,
            accumulate=accumulate,
        )
        compiled_step = TrainStep(
            strategy,
            state,
            trained,
            metrics,
            seed=seed,
            accumulate=accumulate,
            canonical_shards=canonical_shards,
            jit_compile=jit_compile,
            log_ids=sample_log,
            log_losses=divergence.spike_z is not None,
        )
        evaluation = None
        if eval_data is not None:
            evaluation = Evaluation(
                strategy, state, objective, metrics, eval_data, batch_size, data_workers
            )
        config_text = config()

        # ---- Where the run stands.
        def take_over() -> int:
            dirs.create()
            stack.enter_context(dirs.lock())
            checkpoints.clean()
            return 0

        def records_of(steps: range, left_out: LeftOut) -> Iterator[np.ndarray]:
            return train_records(
                train_data,
                steps,
                seed=seed,
                global_batch_size=batch_size,
                left_out=left_out.windows,
            )

        def roll_back(diverged: Diverged, left_out: LeftOut) -> LeftOut:
            """Goes back before the bad steps; returns what is left out from then on."""
            if left_out.rollbacks >= divergence.max_rollbacks:
                raise diverged
            # The batches that led to it may lie before those in which it shows.
            bad, end = diverged.first_step, diverged.end_step
            early = max(0, 2 * bad - end)
            phases.enter('saving', step=end)  # Which may have to be waited for.
            to = int(agreement.chief_does(lambda: checkpoints.go_back(early, at_most=bad) or -1))
            if to < 0:
                raise diverged
            records = next(records_of(range(bad, end), left_out))
            logging.warning(
                'Steps %d to %d were bad: going back to step %d, and leaving out their data. The '
                'records of the first of them: %s',
                bad + 1,
                end,
                to,
                ' '.join(map(str, records)),
            )
            left_out = left_out.more(max(early, to) * batch_size, end * batch_size)
            phases.enter('restoring', rolled_back=end, to=to, **dataclasses.asdict(left_out))
            return left_out

        def go_on(left_out: LeftOut | None = None) -> Result:
            """From the newest good checkpoint to the end."""
            step = int(agreement.chief_does(lambda: checkpoints.newest_good() or 0))
            end = last_step if max_steps is None else min(last_step, step + max_steps)
            known_metrics: dict[str, float] = {}
            bad_steps, warm_started = BadSteps(divergence), None
            progress = Progress(early_stop)
            if step:
                tensors, manifest = checkpoints.read(step)
                check_unchanged(manifest, identity, allow_changes)
                state.restore(tensors)
                known_metrics.update(manifest['metrics'])
                left_out = left_out or LeftOut.of(manifest)
                warm_started = manifest.get('warm_start')
                bad_steps = BadSteps(divergence, manifest.get('bad_steps'))
                progress = Progress(early_stop, manifest.get('early_stop'))
                end = step if progress.is_over else end
                logging.info('resumed at step %d from %s', step, checkpoints.path(step))
                tell_changes(manifest['topology'], topology(strategy, cluster))
                if step >= end:
                    logging.info('There is nothing left to train.')
            elif warm_start is not None:
                warm_started = begin_with(warm_start, state)
            left_out = left_out or LeftOut()
            agreement.check_same('the restored state', lambda: state_sha256(state.snapshot()))

            def save(step: int) -> None:
                if not cluster.is_chief:
                    return
                report.flush()
                checkpoints.save(
                    state.snapshot(),
                    {
                        'step': step,
                        'last_step': step if progress.is_over else last_step,
                        **identity,
                        'config_sha256': hashlib.sha256(config_text.encode()).hexdigest(),
                        'topology': topology(strategy, cluster),
                        'versions': version.versions(),
                        'num_parameters': state.num_parameters,
                        'metrics': known_metrics,
                        'bad_steps': bad_steps.record(),
                        'early_stop': progress.record(),
                        'keep': {'metric': keep.metric, 'mode': keep.mode},
                        'left_out': dataclasses.asdict(left_out),
                        'preprocess': preprocess,
                        'warm_start': warm_started,
                    },
                )

            # ---- The loop.
            batches = train_batches(
                train_data,
                strategy,
                seed=seed,
                global_batch_size=batch_size,
                start_step=step,
                left_out=left_out.windows,
                num_classes=num_classes,
                workers=data_workers,
            )
            report = Report(
                dirs,
                writes=cluster.is_chief,
                step=step,
                last_step=last_step,
                batch_size=batch_size,
                config_text=config_text,
                sample_log=sample_log,
                evaluates=evaluation is not None,
            )
            stack.callback(report.close)
            intervals = [
                Every(interval, steps_per_epoch, step)
                for interval in (log_every, eval_every, save_every, histograms_every)
            ]
            logs, evals, saves, histograms = intervals
            started, steps_per_call = time.monotonic(), 1
            phases.enter('compiling', step=step, last_step=end, measures=known)
            while step < end:
                due = min(every.next_due(step) or end for every in intervals)
                num_steps = min(steps_per_call, due - step, end - step)
                call_started = time.monotonic()
                records = records_of(range(step, step + num_steps), left_out)
                with bad_records_told(train_data, records, num_classes):
                    totals = compiled_step.run(batches, num_steps)
                now = time.monotonic()
                step += num_steps
                known_metrics.clear()  # Those of an earlier step would pass for this one's.
                skipped, losses = totals.pop('skipped_steps'), totals.pop('losses', None)
                diverged = bad_steps.look(step - num_steps, num_steps, skipped, losses)
                if diverged is not None:
                    report.close()
                    del batches  # With what it has fetched ahead.
                    return go_on(roll_back(diverged, left_out))
                report.add(totals, step - num_steps, num_steps, now - call_started)
                phases.enter(
                    'stepping', step=step, **report.figures(totals, num_steps, now - call_started)
                )

                # One small sum over the workers, about once a second, keeps all decisions alike:
                # whether anyone was asked to stop, the chief's clock, the mean pace.
                stopping, elapsed, pace = agreement.sum(
                    [
                        stop.requested,
                        (now - started) if cluster.is_chief else 0.0,
                        (now - call_started) / num_steps / cluster.num_workers,
                    ]
                )
                # The first call of a process compiles, so it may only slow the second one down.
                steps_per_call = max(1, min(int(SECONDS_PER_CALL / pace), 10 * steps_per_call))

                def log() -> None:
                    values = report.train(step, compiled_step.results, state.scalars)  # noqa: B023
                    known_metrics.update({f'train/{name}': v for name, v in values.items()})

                if logs.due(step, elapsed) or step == end:
                    log()
                if histograms.due(step, elapsed):
                    report.histograms(step, state.weights)
                if evaluation and (evals.due(step, elapsed) or step == end):
                    with phases.within_steps('evaluating', step=step):
                        values = evaluation(max_steps)
                    known_metrics.update({f'eval/{name}': v for name, v in values.items()})
                    report.evaluation(step, values)
                # The numbers are sums over all workers, and yet it is the chief who decides.
                measured_now = progress.look(step, known_metrics) and step < end
                if measured_now and agreement.chief_does(lambda: int(progress.is_over)):
                    logging.info('ending early: %s', progress)
                    end = step
                    if 'train/loss' not in known_metrics:
                        log()
                is_candidate = keep.best > 0 and keep.metric in known_metrics
                # From amid bad steps nobody would go on.
                wanted = (saves.due(step, elapsed) or is_candidate) and not bad_steps.in_row
                if wanted or stopping or step == end:
                    with phases.within_steps('saving', step=step):
                        save(step)
                if stopping and step < end:
                    checkpoints.close()
                    raise Preempted(
                        f'saved step {step} of {last_step} after a signal; the same command goes on'
                    )

            # ---- The end.
            phases.enter('saving', step=step)
            checkpoints.close()
            agreement.wait()
            return Result(
                step=step,
                metrics=known_metrics,
                state_sha256=state_sha256(state.snapshot()),
                checkpoint=checkpoints.path(step),
                sample_sha256=report.sample_sha256(),
            )

        phases.enter('restoring')
        agreement.chief_does(take_over)
        stack.enter_context(listing.kept_in(dirs.bad_records(cluster.index)))
        return go_on()
