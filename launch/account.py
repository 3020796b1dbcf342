"""Where the wall time of a job went, over all its attempts: from the ledger and the phases."""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from launch.ledger import Ledger, json_lines
from trainer.model_dir import ModelDir

# Of the step: so many have to be measured for a worker's pace to be told.
_LEAST_CALLS = 10
# In the order of the table, with what each means.
CATEGORIES = {
    'steps': 'training that counts',
    'input wait': 'replicas waiting for a batch',
    'evaluation': '',
    'saving': 'as far as steps waited for it',
    'export': '',
    'start and end': 'processes, TensorFlow, building',
    'compiling': 'until the first step was done',
    'restoring': '',
    'lost': 'beyond a checkpoint gone back to',
    'down': 'until the next attempt',
}
_CATEGORY = {
    'starting': 'start and end',
    'building': 'start and end',
    'indexing': 'start and end',
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
        events: 'stuck', 'exit' and 'rollback' events of the ledger, in order.
        work: of each worker, the median of seconds that its own part of a step takes; empty
            where that is not known.
    """

    seconds: Mapping[str, float]
    wall: float
    attempts: int
    step: int
    events: Sequence[Mapping]
    work: Sequence[float] = ()

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
    lines = {each['number']: _workers(dirs, each) for each in attempts}
    kept = _kept(attempts, lines)
    ends = {
        each['number']: each['time']
        for each in events
        if each['event'] == 'attempt_end' and each['outcome'] != 'failed'
    }
    wall = 0.0
    for begin, end, inside in _spans(events, lines):
        wall += end - begin
        known = 0.0
        for attempt in inside:
            number = attempt['number']
            chief, *others = lines[number]
            for category, spent in _attempt(attempt['time'], chief, others, kept[number]):
                seconds[category] += spent
                known += spent
            if chief and number in ends:
                spent = ends[number] - chief[-1]['time']
                seconds['start and end'] += spent
                known += spent
        seconds['down'] += end - begin - known
    return Account(
        seconds=dict(seconds),
        wall=wall,
        attempts=len(attempts),
        step=[0, *(each['step'] for each in events if each.get('step') is not None)][-1],
        events=[each for each in events if each['event'] in ('stuck', 'exit', 'rollback')],
        work=_work(list(lines.values())[-1]) if lines else (),
    )


def _spans(
    events: Sequence[dict], lines: Mapping[int, Sequence]
) -> Iterator[tuple[float, float, list[dict]]]:
    """Yields begin, end and attempts of each time that a launcher was there."""
    starts = [index for index, each in enumerate(events) if each['event'] == 'job']
    if not starts:
        return  # The ledger lacks its beginning.
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        inside = events[start:stop]
        attempts = [each for each in inside if each['event'] == 'attempt']
        end = inside[-1]['time']
        if inside[-1]['event'] != 'end' and attempts:
            # The launcher was killed: the last sign of life is the workers'.
            end = max([end, *(line['time'] for line in lines[attempts[-1]['number']][0])])
        yield inside[0]['time'], end, attempts


def _workers(dirs: ModelDir, attempt: Mapping) -> list[list[dict]]:
    """The phases of each worker, the chief first; lines that a kill has cut short are left out."""
    directory = dirs.attempt(attempt['number'])
    return [
        [line for line in json_lines(path) if 'time' in line and line.get('phase') in _CATEGORY]
        for path in (directory / f'worker-{i}.phases.jsonl' for i in range(attempt['workers']))
    ]


def _kept(attempts: Sequence[Mapping], lines: Mapping[int, Sequence]) -> dict[int, list[float]]:
    """For each line of the chief of each attempt, up to which step what it tells still counts.

    Steps count that are not beyond a checkpoint that was gone back to later.
    """
    kept: dict[int, list[float]] = {}
    least = math.inf
    for attempt in reversed(attempts):
        chief = lines[attempt['number']][0]
        steps = []
        for line in reversed(chief):
            if 'rolled_back' in line:
                least = min(least, line['to'])
            steps.append(least)
        kept[attempt['number']] = steps[::-1]
        least = min(least, attempt['step'])
    return kept


def _attempt(
    begin: float, chief: Sequence[dict], others: Sequence[Sequence[dict]], kept: Sequence[float]
) -> Iterator[tuple[str, float]]:
    """Yields category and seconds of an attempt up to its last sign of life.

    Args:
        begin: when its workers were started.
        chief: its lines.
        others: those of the other workers; who waits for a batch, all wait for.
        kept: see `_kept`.
    """
    waits = [[x['input_seconds'] for x in lines if 'input_seconds' in x] for lines in others]
    then, phase, call = begin, 'starting', 0
    for line, until in zip(chief, kept, strict=True):
        spent, waited = line['time'] - then, 0.0
        category = _CATEGORY[phase]
        if 'input_seconds' in line:
            longest = max([line['input_seconds'], *(w[call] for w in waits if call < len(w))])
            call += 1
            if phase == 'stepping':
                waited = min(longest, spent)
        # The step in which training went astray is told by the roll-back.
        if phase == 'stepping' and max(line.get('step', 0), line.get('rolled_back', 0)) > until:
            category, waited = 'lost', 0.0
        yield category, spent - waited
        yield 'input wait', waited
        then, phase = line['time'], line['phase']


def _work(workers: Sequence[Sequence[dict]]) -> list[float]:
    """Each worker's median of seconds of work a step; none if any of them has not told."""
    medians = []
    for lines in workers:
        steps = [line for line in lines if 'step' in line]
        paces = [
            line['work_seconds'] / (line['step'] - before['step'])
            for before, line in itertools.pairwise(steps)
            if line.get('work_seconds') and line['step'] > before['step']
        ]
        medians.append(statistics.median(paces) if len(paces) >= _LEAST_CALLS else 0.0)
    return medians if all(medians) else []
