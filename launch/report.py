"""Where the wall time of a job went, over all its attempts: from the ledger and the phases."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from launch.ledger import Ledger, json_lines
from trainer.model_dir import ModelDir

# What takes more than this share is worth a sentence.
_NOTABLE = 0.1
# In the order of the table, with what each means.
CATEGORIES = {
    'steps': 'training that counts',
    'input wait': 'replicas idle for lack of a batch',
    'evaluation': '',
    'saving': 'what the loop waited for',
    'export': '',
    'start and end': 'of processes and TensorFlow, and building the model',
    'compiling': 'until the first step was done',
    'restoring': '',
    'lost': 'steps beyond the checkpoint, done again',
    'down': 'from the last sign of life to the next attempt',
}
_CATEGORY = {
    'starting': 'start and end',
    'building': 'start and end',
    'ending': 'start and end',
    'restoring': 'restoring',
    'compiling': 'compiling',
    'evaluating': 'evaluation',
    'saving': 'saving',
    'exporting': 'export',
    'stepping': 'steps',
}


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of a job's time.

    Attributes:
        seconds: of each category; they add up to `wall`.
        wall: seconds in which a launcher was there, over all its starts.
        attempts: how many.
        step: of the newest checkpoint that the ledger knows.
        events: 'stuck' and 'exit' events of the ledger, in order.
    """

    seconds: Mapping[str, float]
    wall: float
    attempts: int
    step: int
    events: Sequence[Mapping]

    @property
    def goodput(self) -> float:
        """The share of the wall time spent in steps that count."""
        return self.seconds['steps'] / self.wall if self.wall else 0.0


def account(dirs: ModelDir) -> Account:
    """Reads what became of the time of the job in a directory.

    Raises:
        ConfigError: no job has run there.
    """
    events = Ledger(dirs.path / 'ledger.jsonl').history()
    seconds = collections.Counter(dict.fromkeys(CATEGORIES, 0.0))
    attempts = [each for each in events if each['event'] == 'attempt']
    wall = 0.0
    clean_ends = {
        each['number']: each['time']
        for each in events
        if each['event'] == 'attempt_end' and each['outcome'] != 'failed'
    }
    for begin, end, inside in _spans(events, dirs.logs):
        wall += end - begin
        known = 0.0
        for attempt in inside:
            after = [each for each in attempts if each['number'] > attempt['number']]
            kept = after[0]['step'] if after else None
            lines = _lines(dirs.logs, attempt['number'])
            for category, spent in _attempt(attempt['time'], lines, kept):
                seconds[category] += spent
                known += spent
            if lines and attempt['number'] in clean_ends:
                spent = clean_ends[attempt['number']] - lines[-1]['time']
                seconds['start and end'] += spent
                known += spent
        seconds['down'] += end - begin - known
    return Account(
        seconds=dict(seconds),
        wall=wall,
        attempts=len(attempts),
        step=max((each.get('step') or 0 for each in events), default=0),
        events=[each for each in events if each['event'] in ('stuck', 'exit')],
    )


def verdict(result: Account) -> list[str]:
    """Returns what stands out, in plain sentences; none if there is nothing to say."""
    seconds, sentences = result.seconds, []
    training = seconds['steps'] + seconds['lost'] + seconds['input wait']
    waiting = seconds['input wait'] / training if training else 0.0
    if waiting >= _NOTABLE:
        sentences.append(
            f'Input-bound: the replicas waited for batches {waiting:.0%} of the training time. '
            'Make preprocessing and augmentation cheaper, or give them more cores.'
        )
    saving = seconds['saving'] / training if training else 0.0
    if saving >= _NOTABLE:
        sentences.append(
            f'Saving held up training for {saving:.0%} of its time. Save less often, or to a '
            'faster disk.'
        )
    spoilt = seconds['lost'] + seconds['down']
    if result.events and spoilt > _NOTABLE * result.wall:
        sentences.append(
            f'{len(result.events)} failure(s) cost {spoilt:,.0f} s of steps done again and of '
            'waiting. Checkpoints at shorter intervals would lose less.'
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
        bar = ProgressBar(total=1.0, completed=share, width=24)
        table.add_row(category, f'{spent:,.1f}', f'{share:.1%}', bar, meaning)
    table.add_row('all', f'{result.wall:,.1f}', '', '', f'{result.attempts} attempt(s)')
    console = console or Console()
    console.print(table)
    for sentence in verdict(result):
        console.print(sentence, highlight=False)
    console.print(f'goodput {result.goodput:.1%}, newest checkpoint of step {result.step}')
    for event in result.events:
        what = f'worker {event["worker"]} ' + (
            f'was stuck in the phase {event["phase"]!r}'
            if event['event'] == 'stuck'
            else f'ended with {event["code"]}'
        )
        console.print(f'  {what}', highlight=False)


def _spans(events: Sequence[dict], logs: Path) -> Iterator[tuple[float, float, list[dict]]]:
    """Yields begin, end and attempts of each time that a launcher was there."""
    starts = [index for index, each in enumerate(events) if each['event'] == 'job']
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        inside = events[start:stop]
        attempts = [each for each in inside if each['event'] == 'attempt']
        end = inside[-1]['time']
        if inside[-1]['event'] != 'end' and attempts:
            # The launcher was killed: the last sign of life is the workers'.
            end = max([end, *(line['time'] for line in _lines(logs, attempts[-1]['number']))])
        yield inside[0]['time'], end, attempts


def _lines(logs: Path, attempt: int) -> list[dict]:
    """The chief's phases; a line that a kill has cut short is left out."""
    return json_lines(logs / f'attempt-{attempt}' / 'worker-0.phases.jsonl')


def _attempt(begin: float, lines: Sequence[dict], kept: int | None) -> Iterator[tuple[str, float]]:
    """Yields category and seconds of an attempt up to its last sign of life.

    Args:
        begin: when its workers were started.
        lines: the chief's.
        kept: the step that the next attempt began at; None if there is no next one.
    """
    then, phase = begin, 'starting'
    for line in lines:
        spent, waited = line['time'] - then, 0.0
        category = _CATEGORY[phase]
        if phase == 'stepping' and 'step' in line:
            waited = min(line.get('input_seconds', 0.0), spent)
            if kept is not None and line['step'] > kept:
                category, waited = 'lost', 0.0
        yield category, spent - waited
        yield 'input wait', waited
        then, phase = line['time'], line['phase']
