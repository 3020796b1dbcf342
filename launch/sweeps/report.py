"""What came of a sweep: the table of its trials, the best first, and a plot."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.sweeps.book import Book, Trial
from launch.sweeps.plan import RANGES, plain
from trainer.observe import chart

_STYLES = {'failed': 'red', 'stopped': 'dim'}
_COLOURS = {'finished': 'tab:green', 'stopped': 'tab:gray', 'running': 'tab:blue'}
_WIDEST = 1000
_COLUMNS = 3


def ranked(book: Book) -> list[Trial]:
    """Returns the trials: those that finished, the best first, then the others by their numbers."""
    sign = -1 if book.plan['mode'] == 'max' else 1

    def place(trial: Trial) -> tuple:
        done = trial.state == 'finished'
        value = math.inf if not done or trial.value is None else sign * trial.value
        return not done, value, trial.number

    return sorted(book.trials.values(), key=place)


def show(book: Book, console: Console | None = None) -> None:
    """Prints the table of a sweep."""
    console, metric = console or Console(), book.plan['metric']
    table = Table(box=None, pad_edge=False)
    for name in ('trial', *book.plan['parameters'], metric, 'step', 'state'):
        table.add_column(name, justify='left' if name in ('trial', 'state') else 'right')
    for trial in ranked(book):
        value = '' if trial.value is None else f'{trial.value:.4f}'
        table.add_row(
            trial.name,
            *trial.parameters.values(),
            value,
            f'{trial.step:,}' if trial.step else '',
            _state(trial),
            style=_STYLES.get(trial.state, ''),
        )
    # In a pipe a trial is one line, however long.
    console.print(table, **({} if console.is_terminal else {'width': _WIDEST}))
    # In the table they would be narrow columns of many lines.
    for trial in ranked(book):
        if trial.state == 'failed':
            console.print(
                f'{trial.name}: {trial.reason}', highlight=False, markup=False, soft_wrap=True
            )
    states = [_state(trial) for trial in book.trials.values()]
    counts = ', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(sorted(states)))
    console.print(f'{len(states)} of {book.plan["trials"]} trials: {counts}', highlight=False)


def _state(trial: Trial) -> str:
    """What a trial is: one that has been stopped and will go on is not running."""
    interrupted = trial.state == 'running' and trial.code is not None
    return 'interrupted' if interrupted else trial.state


def save_png(book: Book, path: Path) -> None:
    """Draws the metric of all trials, by their numbers and by each parameter.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    parameters = book.plan['parameters']
    trials = [trial for trial in book.trials.values() if trial.value is not None]
    rows = -(-(len(parameters) + 1) // _COLUMNS)
    figure = chart.blank(path, 4 * _COLUMNS, 3 * rows)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    _draw_course(axes[0], book, trials)
    for each, (name, domain) in zip(axes[1:], parameters.items(), strict=False):
        _draw_parameter(each, name, domain, trials)
    for each in axes[: len(parameters) + 1]:
        each.set_ylabel(book.plan['metric'])
        each.spines[['top', 'right']].set_visible(False)
    for each in axes[len(parameters) + 1 :]:
        each.set_axis_off()
    chart.save(figure, path)


def _draw_course(axes: Any, book: Book, trials: list[Trial]) -> None:
    """By number, with the best so far."""
    _points(axes, [trial.number for trial in trials], trials)
    finished = sorted((t for t in trials if t.state == 'finished'), key=lambda t: t.number)
    best, course = max if book.plan['mode'] == 'max' else min, []
    for trial in finished:
        course.append(best([*course[-1:], trial.value]))
    axes.step([t.number for t in finished], course, where='post', color='black', label='best')
    axes.set_xlabel('trial')
    axes.legend(frameon=False, fontsize='small')


def _draw_parameter(axes: Any, name: str, domain: Any, trials: list[Trial]) -> None:
    axes.set_xlabel(name)
    # As `Plan.describe` writes it: of a range its kind and ends.
    if len(domain) == 3 and domain[0] in RANGES:
        _points(axes, [float(trial.parameters[name]) for trial in trials], trials)
        if RANGES[domain[0]][1]:
            axes.set_xscale('log')
        return
    places: Mapping[str, int] = {text: place for place, text in enumerate(domain)}
    _points(axes, [places[trial.parameters[name]] for trial in trials], trials)
    axes.set_xticks(range(len(domain)), [str(plain(text)) for text in domain])


def _points(axes: Any, where: list[float], trials: list[Trial]) -> None:
    for state, colour in _COLOURS.items():
        chosen = [(x, t.value) for x, t in zip(where, trials, strict=True) if t.state == state]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), color=colour, s=16, label=state)
