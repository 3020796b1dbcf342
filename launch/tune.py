"""`phalanx tune`: the largest batch that fits in memory, and a test of the learning rate."""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags, logging

from launch import asked, child
from launch.causes import likely_cause
from launch.interrupt import interruptible
from launch.ledger import Ledger
from trainer.cluster import Cluster
from trainer.console import hidden_stderr, set_up_logging
from trainer.errors import ConfigError, nearest
from trainer.observe import chart

_VERBS = ('batch', 'lr')
_OUT_OF_MEMORY = re.compile(
    r'RESOURCE_EXHAUSTED|ResourceExhausted|OOM when allocating|MemoryError|bad_alloc|'
    r'annot allocate memory|ailed to allocate memory|[Oo]ut of memory|CUDA_ERROR_OUT_OF_MEMORY|'
    # A thread's stack is memory, too.
    r"Resource temporarily unavailable|can't start new thread"
)
_PACE = re.compile(r'([\d,]+) examples/s')
# Killed, as the kernel does for lack of memory; or native code gave up after an allocation.
_KILLED = (-9, 137, -6, 134, -11, 139)
_WHO_SAYS = re.compile(r'^(phalanx: |\s*worker \d+: error: )')
_AS_GOOD = 0.95


def tune(argv: Sequence[str]) -> int:
    """Runs `phalanx tune batch` or `phalanx tune lr`, and returns the exit code.

    Args:
        argv: which of them, its own flags, and those of `phalanx run`.

    Raises:
        ConfigError: a mistake in the flags or the configuration.
    """
    what, *rest = argv or ['']
    if what not in _VERBS:
        raise ConfigError(
            f'phalanx tune {what} is none: write phalanx tune batch or phalanx tune lr.'
            f'{nearest(what, _VERBS)}'
        )
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    asked.define(values)
    flags.DEFINE_integer('tune_steps', None, 'Steps of a try.', 4, flag_values=values)
    if what == 'lr':
        flags.DEFINE_float('lowest', 1e-6, 'The first rate.', flag_values=values)
        flags.DEFINE_float('highest', 1.0, 'The last rate.', flag_values=values)
        flags.DEFINE_string('png', None, 'A file for the chart.', flag_values=values)
    else:
        flags.DEFINE_integer('largest', 65_536, 'No larger batch.', 1, flag_values=values)
    # The directory of the user is not touched: neither test leaves a run.
    with interruptible(), tempfile.TemporaryDirectory(prefix='phalanx-tune-') as aside:
        job = asked.read(values, [*rest, f'--model_dir={aside}/run'])
        if job is None:
            return 0  # Help was asked for.
        if what == 'lr':
            return _rate(job, values.lowest, values.highest, values.tune_steps or 100, values.png)
        given = _without_own(rest)
        sizes = Sizes(lambda size: _try(given, Path(aside), size, values.tune_steps or 20))
        return _batch(sizes, _batch_size(job), values.largest)


# ---- The batch.


@dataclasses.dataclass(frozen=True)
class Try:
    """What became of a batch size.

    Attributes:
        fits: whether its steps were taken.
        examples_per_second: of all replicas, in the second half of the steps.
        why: what the end of a try that does not fit was, in words.
    """

    fits: bool
    examples_per_second: float = 0.0
    why: str = ''


class Sizes:
    """Batch sizes that were tried, each printed as it becomes known.

    A size that is refused for another reason than memory is a limit as well, but for the first.

    Args:
        attempt: takes a few steps with a global batch size, in processes of its own.
    """

    def __init__(self, attempt: Callable[[int], Try]):
        self._attempt = attempt
        self.tried: dict[int, Try] = {}

    def fits(self, size: int) -> bool:
        """Tells whether a size fits, by trying it.

        Raises:
            ConfigError: the first size cannot be run at all.
        """
        if size not in self.tried:
            try:
                found = self._attempt(size)
            except ConfigError as error:
                if not self.tried:
                    raise  # What is wrong at the first size is wrong at all of them.
                # So large a batch may leave too few steps for the schedule, or too few examples.
                found = Try(fits=False, why=f'cannot be run: {error.message}')
            self.tried[size] = found
            said = f'{found.examples_per_second:>10,.0f} examples/s' if found.fits else found.why
            print(f'batch {size:>7,}  {said}', flush=True)
        return self.tried[size].fits

    def largest(self, start: int, most: int) -> int | None:
        """Returns the largest size that fits: doubling, then bisecting in multiples of `start`.

        Args:
            start: a size that the replicas can share; all that are tried are multiples of it.
            most: no larger size is tried.

        Returns:
            The size, to within an eighth; None if `start` does not fit.
        """
        if not self.fits(start):
            return None
        good, bad = start, None
        while bad is None and good * 2 <= most:
            if self.fits(good * 2):
                good *= 2
            else:
                bad = good * 2
        while bad is not None and bad - good > max(start, good // 8):
            middle = (good + bad) // 2 // start * start
            good, bad = (middle, bad) if self.fits(middle) else (good, middle)
        return good

    def fastest(self) -> int:
        """Returns the smallest size that is about as fast as any."""
        paces = {size: each.examples_per_second for size, each in self.tried.items() if each.fits}
        return min(size for size, pace in paces.items() if pace >= _AS_GOOD * max(paces.values()))


def _batch(sizes: Sizes, start: int, most: int) -> int:
    largest = sizes.largest(start, most)
    if largest is None:
        print(
            f'BATCH_SIZE = {start} does not fit. Start from a smaller one, or set '
            'train.accumulate, which splits it.'
        )
        return 1
    met = any(not each.fits for each in sizes.tried.values())
    print(f'largest that fits: {largest:,}{"" if met else " (no limit was met)"}')
    print(f'as fast as any:    {sizes.fastest():,}')
    print(f'BATCH_SIZE = {sizes.fastest()}')
    return 0


def _batch_size(job: asked.Asked) -> int:
    bound = [each.value for each in job.script.bindings if each.name == 'BATCH_SIZE']
    if not bound or not isinstance(bound[-1], int):
        raise ConfigError('From which batch on? Set BATCH_SIZE: --gin.BATCH_SIZE=32.')
    return bound[-1]


def _without_own(argv: Sequence[str]) -> list[str]:
    own = re.compile(r'--?(tune_steps|largest|model_dir)\b')
    for argument in argv:
        if own.match(argument) and '=' not in argument:
            raise ConfigError(f'Write {argument}=VALUE, in one word.')
    return [argument for argument in argv if not own.match(argument)]


def _try(given: Sequence[str], aside: Path, size: int, steps: int) -> Try:
    """Takes a few steps with a batch size, as a job of its own."""
    model_dir = aside / f'batch-{size}'
    command = [
        *child.command('launch', 'run', *given, f'--model_dir={model_dir}'),
        *('--mode=train', '--max_restarts=0', '--logs=none', f'--gin.BATCH_SIZE={size}'),
        *(f'--gin.train.max_steps={steps}', f'--gin.train.log_every={steps // 2}'),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace'
    )
    logs = [path for path in sorted(model_dir.glob('logs/*/*')) if path.is_file()]
    said = '\n'.join(path.read_text(errors='replace') for path in logs)
    if done.returncode == 0:
        paces = _PACE.findall(said)
        if not paces:
            raise ConfigError(
                f'The run of {steps} steps said nothing of its pace. Leave train.log_every alone.'
            )
        return Try(fits=True, examples_per_second=float(paces[-1].replace(',', '')))
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(_WHO_SAYS.sub('', done.stderr.strip().splitlines()[-1]))
    events = Ledger(model_dir / 'ledger.jsonl').read()
    codes = [event.get('code') for event in events if event['event'] == 'exit']
    if _OUT_OF_MEMORY.search(said + done.stderr):
        return Try(fits=False, why='does not fit: out of memory')
    if any(code in _KILLED for code in codes):
        return Try(fits=False, why='does not fit: killed, as for lack of memory')
    failed = next((event for event in events if event['event'] == 'exit'), {'worker': 0})
    workers = sorted(model_dir.glob('logs/attempt-1/worker-*.log'))
    cause = likely_cause(failed['worker'], failed.get('code'), workers)
    raise ConfigError(
        f'A batch of {size} failed, and not for lack of memory: '
        f'{cause or done.stderr.strip()[-500:] or "it said nothing"}'
    )


# ---- The learning rate.


def _rate(job: asked.Asked, lowest: float, highest: float, steps: int, png: str | None) -> int:
    """Trains in this process, with as many replicas as the job has."""
    # What is missing is told before the test.
    figure = chart.blank(Path(png), 8, 4) if png else None
    flags.FLAGS.mark_as_parsed()  # Or absl says that nobody has parsed them.
    logging.set_verbosity(logging.WARNING)
    with hidden_stderr():
        from trainer import gin_setup
    set_up_logging(logging.WARNING)
    gin_setup.load(job.script, unused={'evaluate', 'export'})
    replicas = job.workers * (job.devices_per_worker or 1)
    devices = {'devices_per_worker': replicas} if job.workers > 1 else {}
    strategy = gin_setup.build_strategy(cluster=Cluster(), kind='auto', **devices)
    found = gin_setup.range_test(strategy=strategy, lowest=lowest, highest=highest, steps=steps)
    print(f'{"rate":>10} {"loss":>10} {"smoothed":>10}')
    shown = range(0, len(found.rates), max(1, len(found.rates) // 20))
    for step in sorted({*shown, found.lowest, len(found.rates) - 1}):
        mark = '  lowest' if step == found.lowest else ''
        print(
            f'{found.rates[step]:>10.2e} {found.losses[step]:>10.4g} {found.smoothed[step]:>10.4g}'
            f'{mark}'
        )
    if found.diverged:
        print(f'the loss diverged after a rate of {found.rates[-1]:.2e}')
    if figure:
        _draw(figure, found, Path(png))
    if found.suggestion is None:
        print('The loss never fell: look at the data and the loss, or test a wider range.')
        return 1
    print(f'LEARNING_RATE = {found.suggestion}  (a tenth of the rate of the lowest loss)')
    return 0


def _draw(figure, found, path: Path) -> None:
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color='lightgray', label='loss')
    axes.plot(found.rates, found.smoothed, color='tab:blue', label='smoothed')
    if found.suggestion:
        axes.axvline(found.suggestion, color='tab:green', label=f'suggestion {found.suggestion}')
    axes.set(xscale='log', xlabel='learning rate', ylabel='loss')
    low, high = min(found.losses), max(found.smoothed[: found.lowest + 1])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.legend()
    chart.save(figure, path)
