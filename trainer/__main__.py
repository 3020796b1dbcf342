"""The program of one task of a job: flags, configuration, cluster, strategy, then the work.

Exit codes: 0 finished; 2 wrong flags or configuration; 75 preempted after saving; 1 failed.
"""

import sys
import traceback
from collections.abc import Sequence

from absl import logging

from trainer import flags
from trainer.errors import ConfigError, Diverged, Preempted


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code. What is nobody's mistake but a bug or a fault is raised.
    """
    verbosity = logging.INFO
    try:
        options = flags.parse(sys.argv[1:] if argv is None else argv)
        if options is None:
            return 0
        verbosity = options.verbosity
        logging.use_absl_handler()
        logging.set_verbosity(verbosity)
        _run(options)
    except (ConfigError, Diverged, Preempted) as error:
        if verbosity > logging.INFO:
            traceback.print_exc()
        # Gin appends where the exception passed through it.
        text = getattr(error, 'message', None) or str(error).partition('\n  In call to ')[0]
        kind = 'preempted' if isinstance(error, Preempted) else 'error'
        print(f'{kind}: {text}', file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: flags.Options) -> None:
    # Only now: this imports TensorFlow, which takes seconds that a wrong flag should not cost.
    from trainer import cluster as clusters
    from trainer import gin_setup

    cluster = clusters.from_environ()
    mode = 'evaluate' if cluster.type == 'evaluator' else options.mode
    gin_setup.load(
        options.gin_files,
        options.gin_bindings,
        options.gin_search_path,
        unused={'train', 'evaluate', 'export'} - _CALLED[mode],
    )
    if options.dry_run:
        from trainer.dry_run import dry_run

        dry_run(cluster)
        return
    if mode == 'export':
        if cluster.is_chief:
            print(f'SavedModel: {gin_setup.export()}')
        return
    # Nothing that runs a TensorFlow operation may come before the strategy.
    gin_setup.meet(cluster=cluster, digest=gin_setup.digest())
    strategy = gin_setup.build_strategy(cluster=cluster)
    if mode == 'evaluate':
        following = {'follow': True} if cluster.type == 'evaluator' else {}
        results = gin_setup.evaluate(strategy=strategy, **following)
        if cluster.is_chief:
            print(_values(results))
        return
    without = {'eval_data': None} if mode == 'train' else {}
    result = gin_setup.train(strategy=strategy, cluster=cluster, config=gin_setup.record, **without)
    exported = None
    if mode == 'train_and_evaluate' and cluster.is_chief:
        exported = gin_setup.export()
    if cluster.is_chief:
        print(f'finished step {result.step}: {_values(result.metrics)}')
        print(f'state sha256: {result.state_sha256}')
        print(f'checkpoint:   {result.checkpoint}')
        print(f'TensorBoard:  tensorboard --logdir {result.checkpoint.parents[1]}')
        if exported:
            print(f'SavedModel:   {exported}')


_CALLED = {
    'train': {'train'},
    'evaluate': {'evaluate'},
    'train_and_evaluate': {'train', 'export'},
    'export': {'export'},
}


def _values(values: dict[str, float]) -> str:
    return ', '.join(f'{name} {value:.4f}' for name, value in values.items())


if __name__ == '__main__':
    sys.exit(main())
