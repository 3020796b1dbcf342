"""A recorded job once more, from its record alone, and whether it comes to the same bits."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch import record
from trainer.errors import ConfigError, Preempted, WriteError
from trainer.model_dir import ModelDir

# Of the place where a job ran and of its result, what the bits may depend on.
_CAUSES = ('versions', 'git', 'processor', 'cpus', 'workers', 'imports')
_RESULTS = ('step', 'versions', 'topology', 'data_fingerprint', 'sample_sha256')


def rerun(old: ModelDir, new: ModelDir, run: Callable[[Sequence[str]], int]) -> int:
    """Runs the job of `old` again in `new`, and prints how the two compare.

    Args:
        old: the directory of a job that has finished.
        new: where to; there must be no run in it.
        run: `phalanx run` with such flags, returns its exit code.

    Returns:
        0 for the same bits, 1 for others, else the exit code of the run.

    Raises:
        ConfigError: there is no record, its job has not finished, or `new` is taken.
    """
    then = record.read(old)
    if then['outcome'] != 'finished' or not then['result']:
        raise ConfigError(
            f'The job in {str(old.path)!r} has not finished ({then["outcome"] or "no end"}), so '
            'there is nothing to compare with. Bring it to its end with `phalanx run` first.'
        )
    taken = [new.path / name for name in (record.NAME, 'ledger.jsonl', 'samples.tsv')]
    for path in (*taken, *new.checkpoints.glob('*')):
        if path.exists():
            raise ConfigError(
                f'--model_dir={new.path} holds a run already ({path.relative_to(new.path)}). Give '
                'a directory that is new.'
            )
    was_there = new.path.exists()
    new.create()
    config = new.config / 'recorded.gin'
    config.write_text(then['config'], encoding='utf-8')
    flags = [*_flags(then), f'--gin_file={config}', f'--model_dir={new.path}']
    try:
        code = run(flags)
    except ConfigError:
        if not was_there:
            shutil.rmtree(new.path, ignore_errors=True)
        raise
    if code == ConfigError.exit_code and not was_there:
        shutil.rmtree(new.path, ignore_errors=True)
    if code == Preempted.exit_code:
        command = shlex.join(['phalanx', 'run', *flags])
        print(f'phalanx: stopped before there was anything to compare; {command}', file=sys.stderr)
    if code:
        return code
    now = record.read(new)
    if not now['result']:
        raise WriteError(
            f'There is nothing to compare with: {str(new.path / record.NAME)!r} has no result.'
        )
    print('\n'.join(compare(old, then, new, now)))
    return 0 if _sha256(then) == _sha256(now) else 1


def compare(
    old: ModelDir, then: Mapping[str, Any], new: ModelDir, now: Mapping[str, Any]
) -> list[str]:
    """Returns what there is to say of two records, in lines."""
    step = then['result']['step']
    if _sha256(then) == _sha256(now):
        return [f'the same bits: state sha256 {_sha256(then)} at step {step}']
    lines = [
        'other bits:',
        f'  {old.path}: state sha256 {_sha256(then)} at step {step}',
        f'  {new.path}: state sha256 {_sha256(now)} at step {now["result"]["step"]}',
    ]
    causes = list(_causes(then, now))
    if not causes:
        clean = [(job.get('git') or {}).get('dirty') is False for job in (then, now)]
        code = '' if all(clean) else ' The code of your own modules is not recorded: compare it.'
        return [
            *lines,
            f'Nothing that is recorded differs.{code} Look for what depends on neither seed nor '
            'step: randomness of your own, a clock, a file.',
        ]
    return [*lines, 'What differs, then and now:', *(f'  {each}' for each in causes)]


def _flags(then: Mapping[str, Any]) -> list[str]:
    """The flags of a record, but for those that tell the configuration: it is one text by now."""
    policy = dict(then['policy'])
    flags = [f'--workers={then["workers"]}', f'--{"" if policy.pop("elastic") else "no"}elastic']
    flags += [f'--{name}={value}' for name, value in policy.items()]
    if then['devices_per_worker'] is not None:
        flags.append(f'--devices_per_worker={then["devices_per_worker"]}')
    return [*flags, f'--mode={then["mode"]}', f'--verbosity={then["verbosity"]}']


def _sha256(job: Mapping[str, Any]) -> str:
    return job['result']['state_sha256']


def _causes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    # What the workers have found themselves counts more than what the launcher has seen.
    before = {name: then.get(name) for name in _CAUSES} | _picked(then)
    after = {name: now.get(name) for name in _CAUSES} | _picked(now)
    yield from _differences(before, after)
    for number, start in enumerate(then['starts'][1:], 2):
        changed = list(_differences(_asked(then), _asked(start)))
        if changed:
            yield f'the job was started {number} times, the last with other flags or files: ' + (
                '; '.join(changed)
            )


def _picked(job: Mapping[str, Any]) -> dict[str, Any]:
    return {name: job['result'].get(name) for name in _RESULTS}


def _asked(start: Mapping[str, Any]) -> dict[str, Any]:
    names = ('workers', 'config_sha256', 'git', 'versions', 'processor', 'intra_op_threads')
    return {name: start.get(name) for name in names}


def _differences(before: Any, after: Any, name: str = '') -> Iterator[str]:
    if isinstance(before, Mapping) or isinstance(after, Mapping):
        before, after = before or {}, after or {}
        for key in {**before, **after}:
            path = f'{name}.{key}' if name else key
            yield from _differences(before.get(key), after.get(key), path)
    elif before != after:
        yield f'{name}: {before} / {after}'
