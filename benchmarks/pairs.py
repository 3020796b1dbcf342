"""Takes turns between things to be compared, and prints what came out, with its spread.

Import it before TensorFlow and before `trainer`: it makes both the checkout's and the CPU's.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Of some processors TensorFlow makes it a choice; PyTorch uses oneDNN on all of them.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')


def arguments(doc: str, **defaults: int | str) -> argparse.Namespace:
    """Parses the command line: `--markdown`, and `--NAME=VALUE` for each default.

    Args:
        doc: the benchmark's docstring, shown by `--help`.
        **defaults: options of this benchmark; their types are those of the defaults.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--markdown', action='store_true', help='print rows of a markdown table')
    for name, default in defaults.items():
        parser.add_argument(f'--{name}', type=type(default), default=default, help=repr(default))
    return parser.parse_args()


def seconds(action: Callable[..., object], *args: object) -> Callable[[], float]:
    """Returns a function that calls action(*args) and returns how long it took."""

    def timed() -> float:
        begin = time.perf_counter()
        action(*args)
        return time.perf_counter() - begin

    return timed


def rate(count: int, action: Callable[..., object], *args: object) -> Callable[[], float]:
    """Returns a function that calls action(*args), which does `count` things, and returns how many
    it did a second."""
    timed = seconds(action, *args)
    return lambda: count / timed()


def alternate(*takes: Callable[[], float], rounds: int) -> list[list[float]]:
    """Measures in turns, so that whatever else the machine does meets all alike.

    Args:
        *takes: each call does its work once and returns one measurement.
        rounds: how often each is called, after a first call that does not count; every second
            round goes backwards.

    Returns:
        For each of `takes`, its measurements in the order of the rounds.
    """
    for take in takes:
        take()
    taken = [[0.0] * rounds for _ in takes]
    for number in range(rounds):
        turn = range(len(takes))
        for index in reversed(turn) if number % 2 else turn:
            taken[index][number] = takes[index]()
    return taken


class Table:
    """Comparisons, printed as they come.

    Args:
        title: the claim, in a line.
        ours, theirs: names of what is compared.
        markdown: whether to print a markdown table.
    """

    def __init__(self, title: str, ours: str, theirs: str, *, markdown: bool = False):
        self._markdown, self._theirs = markdown, theirs
        heads = ('what', ours, theirs, 'ratio', 'quartiles', 'range', 'target')
        print(f'\n{title}', f'{machine()}\n', sep='\n', flush=True)
        self._print(heads)
        if markdown:
            self._print(['---'] * len(heads))

    def row(
        self,
        what: str,
        ours: Sequence[float],
        theirs: Sequence[float] | None,
        unit: str,
        target: str = '',
    ) -> None:
        """Prints the medians, their ratio, and the spread of the ratios within each round.

        Args:
            what: was measured.
            ours, theirs: measurements; those of one round have the same index. None where the
                other side is not there to be measured.
            unit: of the measurements.
            target: '>= 1.5' or '<= 1.1', if the ratio has one.
        """
        mine = f'{_short(statistics.median(ours))} {unit}'
        if theirs is None:
            self._print([what, mine, f'{self._theirs} not given', '', '', '', ''])
            return
        ratio = statistics.median(ours) / statistics.median(theirs)
        pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        low, _, high = statistics.quantiles(pairs, n=4, method='inclusive')
        verdict = ''
        if target:
            relation, bound = target.split()
            held = ratio >= float(bound) if relation == '>=' else ratio <= float(bound)
            verdict = f'{target}: {"holds" if held else "missed"}'
        self._print(
            [
                what,
                mine,
                f'{_short(statistics.median(theirs))} {unit}',
                f'{ratio:.3g}',
                f'{low:.3g}..{high:.3g}',
                f'{pairs[0]:.3g}..{pairs[-1]:.3g} (n={len(pairs)})',
                verdict,
            ]
        )

    def _print(self, cells: Sequence[str]) -> None:
        if self._markdown:
            print('|', ' | '.join(cells), '|', flush=True)
            return
        widths = (34, 17, 17, 7, 14, 23, 0)
        print('  '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True)), flush=True)


def _short(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def machine() -> str:
    """Returns what the measurements were taken on, in words."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        lines = [line for line in file if line.startswith('model name')]
    model = lines[0].partition(':')[2].strip() if lines else platform.processor()
    load = os.getloadavg()[0]
    return f'{len(os.sched_getaffinity(0))} cores of {model}, load {load:.1f} at the start'
