"""What became of a job, for people: the table of its time, and what stands out, in sentences."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from launch.account import CATEGORIES, Account, account
from trainer.model_dir import ModelDir
from trainer.observe import chart

# What takes more than this share is worth a sentence, if there is much to share.
_NOTABLE = 0.2
_LEAST_SECONDS = 30.0
# Workers of one host differ by chance by less than this.
_SLOWER = 1.5


def verdict(result: Account) -> list[str]:
    """Returns what stands out, in plain sentences; none if there is nothing to say."""
    seconds, sentences = result.seconds, []
    loop = sum(seconds[name] for name in ('steps', 'lost', 'input wait', 'saving', 'evaluation'))
    worth = max(_NOTABLE * loop, _NOTABLE * _LEAST_SECONDS)
    if seconds['input wait'] >= worth:
        sentences.append(
            f'Input-bound {seconds["input wait"] / loop:.0%} of the time in the training loop: so '
            'long did replicas wait for batches. Make preprocessing and augmentation cheaper, or '
            'give them more cores.'
        )
    if slow := _slowest(result):
        sentences.append(slow)
    if seconds['saving'] >= worth:
        sentences.append(
            f'Saving held up the training loop for {seconds["saving"] / loop:.0%} of its time. '
            'Save less often, or to a faster disk.'
        )
    spoilt = seconds['lost'] + seconds['down']
    rollbacks = sum(event['event'] == 'rollback' for event in result.events)
    failures = len(result.events) - rollbacks
    if failures and spoilt > _NOTABLE * result.wall:
        sentences.append(
            f'{failures} failure(s) cost {spoilt:,.0f} s of steps done again and of '
            'waiting. Checkpoints at shorter intervals would lose less.'
        )
    if rollbacks:
        sentences.append(
            f'Training went astray and went back to a checkpoint {rollbacks} time(s), without the '
            'data in between. Look at that data, lower the learning rate, or clip gradients.'
        )
    return sentences


def show(dirs: ModelDir, console: Console | None = None) -> None:
    """Prints the account of a job as a table with bars."""
    result = account(dirs)
    table = Table(box=None, pad_edge=False)
    for name, justify in (('', 'left'), ('seconds', 'right'), ('share', 'right'), ('', 'left')):
        table.add_column(name, justify=justify)
    table.add_column('')
    for category, meaning in CATEGORIES.items():
        spent = result.seconds[category]
        share = spent / result.wall if result.wall else 0.0
        bar = ProgressBar(total=1.0, completed=share, width=20)
        table.add_row(category, f'{spent:,.1f}', f'{share:.1%}', bar, meaning)
    table.add_row('all', f'{result.wall:,.1f}', '', '', f'{result.attempts} attempt(s)')
    console = console or Console()
    console.print(table)
    for sentence in verdict(result):
        console.print(sentence, highlight=False)
    console.print(f'goodput {result.goodput:.1%}, newest checkpoint of step {result.step}')
    for event in result.events:
        console.print(f'  {_told(event)}', highlight=False)


def markdown(result: Account) -> str:
    """Returns the account and the verdict as TensorBoard shows them."""
    rows = ['| | seconds | share | |', '|---|---:|---:|---|']
    for category, meaning in CATEGORIES.items():
        spent = result.seconds[category]
        share = spent / result.wall if result.wall else 0.0
        rows.append(f'| {category} | {spent:,.1f} | {share:.1%} | {meaning} |')
    rows.append(f'| all | {result.wall:,.1f} | | {result.attempts} attempt(s) |')
    events = [f'* {_told(event)}' for event in result.events]
    goodput = f'Goodput {result.goodput:.1%}.'
    return '\n\n'.join(['\n'.join(rows), goodput, *verdict(result), '\n'.join(events)]).strip()


def save_png(dirs: ModelDir, path: Path) -> None:
    """Draws the account of a job as bars.

    Raises:
        ConfigError: no job has run there, matplotlib is not installed, or the file cannot be
            written.
    """
    result = account(dirs)
    figure = chart.blank(path, 8, 4)
    axes = figure.subplots()
    names = list(CATEGORIES)[::-1]
    shares = [100 * result.seconds[name] / max(result.wall, 1e-9) for name in names]
    colours = ['tab:green' if name == 'steps' else 'tab:gray' for name in names]
    bars = axes.barh(names, shares, color=colours)
    axes.bar_label(bars, [f'{result.seconds[name]:,.1f} s' for name in names], padding=3)
    axes.set_xlabel(f'% of {result.wall:,.0f} s, {result.attempts} attempt(s)')
    axes.set_title(f'goodput {result.goodput:.1%}')
    axes.margins(x=0.12)
    axes.spines[['top', 'right']].set_visible(False)
    chart.save(figure, path)


def _slowest(result: Account) -> str:
    if len(result.work) < 2:
        return ''
    slow = max(range(len(result.work)), key=lambda index: result.work[index])
    others = [work for index, work in enumerate(result.work) if index != slow]
    times = result.work[slow] / statistics.median(others)
    if times < _SLOWER:
        return ''
    return (
        f'Worker {slow} is {times:.1f} times slower than the others, which wait for it in every '
        'step. See what else its cores or its GPU are doing.'
    )


def _told(event: Mapping) -> str:
    if event['event'] == 'rollback':
        return f'went back from step {event["rolled_back"]} to step {event["to"]}'
    if event['event'] == 'stuck':
        return f'worker {event["worker"]} was stuck in the phase {event["phase"]!r}'
    return f'worker {event["worker"]} ended with {event["code"]}'
