"""`phalanx inspect`: what is in data, shown in a terminal; the damage too."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch import data_flags, verb_flags
from trainer.console import hidden_stderr
from trainer.data import dataset, statistics
from trainer.errors import ConfigError
from trainer.flags import rewrite_gin_flags

if TYPE_CHECKING:
    from trainer.data.source import Source
    from trainer.inspect_data import Findings

# So many records tell what the others are like, where nobody has read them all yet.
_SAMPLED = 2000
_EXAMPLES = 5
_PICTURES = 36
# Of more classes, the most and the least frequent ones are shown.
_MOST_CLASSES = 40
_ENDS = 10
# With fewer records for each on average they are no classes, but numbers.
_LEAST_RECORDS = 2
# Arrays of more values are shown by their least, greatest and mean one.
_MOST_VALUES = 8
_LONGEST_TEXT = 60


def inspect(argv: Sequence[str]) -> int:
    """Shows what is in data.

    Args:
        argv: the arguments of `phalanx inspect`.

    Returns:
        The exit code: 1 if something is damaged, else 0.

    Raises:
        ConfigError: a mistake in the flags or the configuration, there is no such data, or the
            file of --png cannot be written.
        WriteError: the directory of --tensorboard cannot be written.
        OSError: the data is out of reach.
    """
    own = data_flags.define()
    new = {'flag_values': own}
    flags.DEFINE_boolean('verify', False, 'Read everything.', **new)
    flags.DEFINE_string('png', None, 'A file for some images.', **new)
    flags.DEFINE_string('tensorboard', None, 'A directory for some images.', **new)
    rest = verb_flags.parse(own, 'inspect', rewrite_gin_flags(argv))
    if len(rest) + bool(own.gin_file) != 1:
        raise ConfigError(
            'What shall be looked at? Write: phalanx inspect DIR, of prepared data, or phalanx '
            'inspect --gin_file=FILE, such as --gin_file=data/digits.gin.'
        )
    console = Console(highlight=False)
    if own.gin_file:
        script = data_flags.read(own)
        with hidden_stderr():
            from trainer import gin_setup
        sources, is_bad = gin_setup.sources(script), False
    else:
        sources, is_bad = _open(rest[0], console, verify=own.verify)
    for split, source in sources.items():
        known = getattr(source, 'numbers', None)
        found = None
        if own.verify or known is None:
            found = _survey(source, source.num_examples if own.verify else _SAMPLED, split)
            is_bad = is_bad or bool(found.bad)
        _show(console, split, source, known if known is not None else found.numbers, found)
    if own.png or own.tensorboard:
        _picture(sources, own.png, own.tensorboard)
    return int(is_bad)


def _open(directory: str, console: Console, *, verify: bool) -> tuple[dict[str, 'Source'], bool]:
    """Returns the sources of a prepared directory that can be read, and whether it is damaged."""
    described = dataset.read(directory)
    broken, is_bad = set(), False
    if verify:
        shards = [(name, each) for name, s in described['splits'].items() for each in s['shards']]
        with _bar('checksums', len(shards)) as advance:
            for split, shard in shards:
                wrong = dataset.wrong_with(shard, directory)
                path = dataset.join(directory, shard['file'])
                if wrong:
                    broken.add(split)
                elif dataset.sha256(path) != shard['sha256']:
                    wrong = f'{path} has changed: its sha256 is not the one of {dataset.NAME}.'
                if wrong:
                    is_bad = True
                    console.print(Text(wrong, 'red'), soft_wrap=True)
                advance(1)
    with hidden_stderr():
        from trainer.data.prepared import prepared
    sources = {
        split: prepared(directory, split) for split in described['splits'] if split not in broken
    }
    files = sum(len(split['shards']) for split in described['splits'].values())
    size = sum(each['bytes'] for s in described['splits'].values() for each in s['shards'])
    console.print(
        f'{directory}: {files} {described["files"]} files, {size / 10**6:,.1f} MB, written by '
        f'Phalanx {described["phalanx"]}',
        soft_wrap=True,
    )
    for name, split in described['splits'].items():
        if split['left_out']:
            console.print(
                f'{name}: {len(split["left_out"]):,} damaged records were left out of the '
                f'{split["source"]["records"]:,} it was made of'
            )
    return sources, is_bad


def _survey(source: 'Source', count: int, split: str) -> 'Findings':
    from trainer import inspect_data
    from trainer.data.scan import spread

    records = spread(source, count)
    threads = len(os.sched_getaffinity(0))
    with _bar(f'reading {split}', len(records)) as advance:
        return inspect_data.survey(source, records, threads=threads, progress=advance)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far something is, in a terminal, and gives the function that moves it on."""
    console = Console(stderr=True)
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _show(
    console: Console,
    split: str,
    source: 'Source',
    numbers: Mapping[str, statistics.Numbers],
    found: 'Findings | None',
) -> None:
    console.print(f'\n[bold]{split}[/]  {source.num_examples:,} records')
    if found and found.read < source.num_examples:
        console.print(f'from {found.read:,} records, evenly spaced; --verify reads all:')
    console.print(_features(source, numbers))
    for name, each in numbers.items():
        if each.counts and each.count >= _LEAST_RECORDS * len(each.counts):
            console.print(_classes(name, each.counts, _names(source, name)))
    console.print(_examples(source, found))
    if not found:
        return
    for bad in found.bad:
        console.print(Text(f'damaged: {bad.where}: {bad.reason}', 'red'), soft_wrap=True)
    if found.read == source.num_examples:
        console.print(f'{found.read:,} records were read; {len(found.bad) or "none"} damaged')


def _features(source: 'Source', numbers: Mapping[str, statistics.Numbers]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column('feature')
    table.add_column('dtype')
    table.add_column('shape')
    for name in ('min', 'max', 'mean', 'std'):
        table.add_column(name, justify='right')
    # A column that is seldom needed.
    not_finite = any(each.not_finite for each in numbers.values())
    table.add_column('not finite' if not_finite else '', justify='right')
    for name, spec in source.element_spec.items():
        shape = ' x '.join(map(str, spec.shape.as_list())) or 'one value'
        each, cells = numbers.get(name), []
        if each is not None and each.count:
            cells = [_number(value) for value in (each.min, each.max, each.mean, each.std)]
            cells.append(f'{each.not_finite:,}' if each.not_finite else '')
        table.add_row(name, spec.dtype.name, shape, *cells)
    return table


def _classes(name: str, counts: Mapping[int, int], class_names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(name, justify='right')
    table.add_column('')
    for title in ('records', 'share'):
        table.add_column(title, justify='right')
    table.add_column('')
    total, most, rows = sum(counts.values()), max(counts.values()), list(counts.items())
    if len(rows) > _MOST_CLASSES:
        rows.sort(key=lambda row: -row[1])
        rows = [*rows[:_ENDS], None, *rows[-_ENDS:]]
    for row in rows:
        if row is None:
            table.add_row('...', f'{len(counts) - 2 * _ENDS:,} more')
            continue
        value, times = row
        word = class_names[value] if 0 <= value < len(class_names) else ''
        bar = ProgressBar(total=most, completed=times, width=30)
        table.add_row(str(value), word, f'{times:,}', f'{times / total:.1%}', bar)
    return table


def _label(source: 'Source') -> str:
    """Which feature has the classes that the source names."""
    return getattr(source, 'label', None) or 'label'


def _names(source: 'Source', feature: str) -> Sequence[str]:
    """Returns the names of the values 0, 1, ... of a feature, () if they have none."""
    return source.class_names if feature == _label(source) else ()


def _examples(source: 'Source', found: 'Findings | None') -> Table:
    from trainer.data.scan import Scan, spread

    batch = Scan(source).read(spread(source, _EXAMPLES))
    table = Table(box=None, pad_edge=False)
    for name in ('record', *batch.features, 'where'):
        table.add_column(name, overflow='fold')
    for row, record in enumerate(batch.records):
        cells = [_value(values[row]) for values in batch.features.values()]
        table.add_row(str(record), *map(Text, cells), Text(source.where(int(record))))
    return table


def _value(value: Any) -> str:
    """A value of a feature, short enough for a table."""
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return f'{len(value):,} bytes: {value[:8].hex(" ")} ...'
        text = ' '.join(text.split())
        return text if len(text) <= _LONGEST_TEXT else f'{text[:_LONGEST_TEXT]}...'
    array = np.asarray(value)
    if array.dtype == object:  # Texts.
        texts = [_value(each) for each in array.ravel()[:_MOST_VALUES]]
        return ', '.join(texts + ['...'] * (array.size > _MOST_VALUES))
    if array.size <= _MOST_VALUES:
        return ' '.join(_number(each) for each in array.ravel().tolist())
    as_float = array.astype(np.float64)
    return f'{_number(as_float.min())} to {_number(as_float.max())}, mean {as_float.mean():.4g}'


def _number(value: float) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:.5g}'


def _picture(sources: Mapping[str, 'Source'], png: str | None, tensorboard: str | None) -> None:
    """Writes some images of the first split that has any, or of all of them for TensorBoard."""
    from trainer import inspect_data
    from trainer.data.scan import Scan, spread

    drawn = unreadable = False
    for split, source in sources.items():
        name = inspect_data.image_of(source)
        if name is None:
            continue
        batch = Scan(source).read(spread(source, _PICTURES))
        if not len(batch.records):
            unreadable = True
            continue
        known = getattr(source, 'numbers', None) or statistics.of_features(batch.features)
        # Where no number is finite there are no bounds, and nothing but black.
        bounds = float(known[name].min or 0), float(known[name].max or 0)
        pictures = inspect_data.as_pictures(batch.features[name], bounds)
        labels = _labels(source, batch.features) or [str(each) for each in batch.records]
        if png and not drawn:
            inspect_data.save_sheet(Path(png), pictures, labels)
        if tensorboard:
            tags = [f'{label}/{each}' for label, each in zip(labels, batch.records, strict=True)]
            inspect_data.to_tensorboard(Path(tensorboard), split, pictures, tags)
        drawn = True
    if not drawn and unreadable:
        raise ConfigError(
            'There are no images to be drawn: all that were looked at are damaged. '
            '`phalanx inspect --verify` lists them.'
        )
    if not drawn:
        raise ConfigError(
            'There are no images to be drawn: no feature has the shape (height, width, 1, 3 or 4).'
        )


def _labels(source: 'Source', features: Mapping[str, np.ndarray]) -> list[str]:
    """Returns what each example is called, if a feature says so: 'label', or one like it."""
    whole = [
        name for name, values in features.items() if values.ndim == 1 and values.dtype.kind in 'iu'
    ]
    if not whole:
        return []
    label = _label(source) if _label(source) in whole else whole[0]
    names, values = _names(source, label), features[label].tolist()
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else str(v) for v in values]
