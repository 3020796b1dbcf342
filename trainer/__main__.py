"""The program of one task of a job: flags, configuration, cluster, strategy, then the work.

Exit codes: 0 finished; 2 wrong flags or configuration; 75 preempted after saving; 1 failed.
"""

import sys
import traceback
from collections.abc import Mapping, Sequence

from absl import logging
from absl.flags import FLAGS

from trainer import flags, gin_files
from trainer.cluster import from_environ
from trainer.console import hidden_stderr, set_up_logging
from trainer.errors import ConfigError, Diverged, Preempted, ReadError, WriteError
from trainer.observe import phases


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code. What is nobody's mistake but a bug or a fault is raised.
    """
    logging.set_verbosity(logging.INFO)
    try:
        options = flags.parse(sys.argv[1:] if argv is None else argv)
        if options is None:
            return 0
        FLAGS.mark_as_parsed()  # Or absl says that nobody has parsed them.
        logging.use_absl_handler()
        _run(options)
    except (ConfigError, Diverged, Preempted, ReadError, WriteError) as error:
        if logging.get_verbosity() > logging.INFO:
            traceback.print_exc()
        # Gin appends where the exception passed through it.
        text = getattr(error, 'message', None) or str(error).partition('\n  In call to ')[0]
        kind = 'preempted' if isinstance(error, Preempted) else 'error'
        print(f'{kind}: {text}', file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: flags.Options) -> None:
    if options.gin_script and options.gin_files:
        raise ConfigError('Give either --gin_file or --gin_script, which is in place of files.')
    if options.gin_script:
        script = gin_files.load(options.gin_script, options.gin_bindings)
    else:
        script = gin_files.read(options.gin_files, options.gin_bindings, options.gin_search_path)
    cluster = from_environ()
    mode = 'evaluate' if cluster.type == 'evaluator' else options.mode
    rehearsal = options.dry_run or options.check_workers
    called = _CALLED['train_and_evaluate' if rehearsal else mode]

    phases.enter('starting')
    # Only now: it takes seconds that a slip of the pen should not cost.
    with hidden_stderr():
        import tensorflow  # noqa: F401

    from trainer import gin_setup
    from trainer.agreement import Agreement
    from trainer.dry_run import dry_run

    gin_setup.load(script, unused={'train', 'evaluate', 'export'} - called)
    set_up_logging(options.verbosity)
    if mode == 'export' and not rehearsal:
        if cluster.is_chief:
            print(f'SavedModel: {gin_setup.export()}')
        return
    if options.check_workers:
        one = {'kind': 'auto', 'devices_per_worker': 1, 'collective': 'auto'}
        strategy = gin_setup.build_strategy(cluster=cluster, **one)
        dry_run(strategy, cluster, gin_setup.model_dir(), options.check_workers)
        return
    if mode == 'serve_data' and not rehearsal:
        server = gin_setup.data_server(options.listen)
        logging.info('making batches for who asks at %s', server.address)
        phases.enter('serving')
        server.wait()
        return
    # Nothing that runs a TensorFlow operation may come before the strategy.
    gin_setup.meet(cluster=cluster, digest=gin_setup.digest())
    strategy = gin_setup.build_strategy(cluster=cluster)
    if options.dry_run:
        dry_run(strategy, cluster, gin_setup.model_dir())
        return
    if mode == 'evaluate':
        following = {'follow': True} if cluster.type == 'evaluator' else {}
        results = gin_setup.evaluate(strategy=strategy, **following)
        if cluster.is_chief:
            print(_values(results))
        return
    without = {'eval_data': None} if mode == 'train' else {}
    result = gin_setup.train(
        strategy=strategy,
        cluster=cluster,
        config=gin_setup.record,
        data_workers=gin_setup.data_workers(),
        **without,
    )
    exported = None
    phases.enter('exporting', step=result.step)
    if mode == 'train_and_evaluate' and cluster.is_chief:
        exported = gin_setup.export()
    # Workers that end early would look like finished ones if the export failed.
    Agreement(strategy, cluster).wait()
    phases.enter('ending')
    if cluster.is_chief:
        print(f'finished step {result.step}: {_values(result.metrics)}')
        print(f'state sha256: {result.state_sha256}')
        if result.sample_sha256:
            print(f'sample order: {result.sample_sha256}')
        print(f'checkpoint:   {result.checkpoint}')
        print(f'TensorBoard:  tensorboard --logdir {result.checkpoint.parents[1]}')
        if exported:
            print(f'SavedModel:   {exported}')


_CALLED = {
    'train': {'train'},
    'evaluate': {'evaluate'},
    'train_and_evaluate': {'train', 'export'},
    'export': {'export'},
    'serve_data': {'train'},
}


def _values(values: Mapping[str, float | None]) -> str:
    # A metric that was not finite comes back from a checkpoint as None.
    return ', '.join(f'{k} {"not finite" if v is None else f"{v:.4f}"}' for k, v in values.items())


if __name__ == '__main__':
    sys.exit(main())
