"""What a trial measures, by the word of the chief of its workers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.ledger import json_lines
from trainer.model_dir import ModelDir


def evaluations(dirs: ModelDir, metric: str) -> dict[int, float]:
    """Returns the metric at each step at which a run was evaluated."""
    lines = (line for line in _lines(dirs, dirs.attempts()) if metric in line and 'step' in line)
    found = {line['step']: float(line[metric]) for line in lines}
    return dict(sorted(found.items()))


def measures(dirs: ModelDir) -> Sequence[str]:
    """Returns what a run measures, 'eval/loss' and so on; nothing before its model is built.

    It is the word of its newest attempt: what is wrong may have been mended since one before.
    """
    lines = [line for line in _lines(dirs, dirs.attempts()[-1:]) if 'measures' in line]
    return lines[-1]['measures'] if lines else ()


def _lines(dirs: ModelDir, attempts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    for number in attempts:
        yield from json_lines(dirs.attempt(number) / 'worker-0.phases.jsonl')
