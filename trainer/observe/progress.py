"""One plain line a time that says how far a run is, for logs and people."""

import collections
import time
from collections.abc import Callable, Mapping


def duration(seconds: float) -> str:
    """Returns a length of time as '0:01:23' or, from a day on, '2 d 3:04:05'."""
    days, seconds = divmod(round(seconds), 86_400)
    text = f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'
    return f'{days} d {text}' if days else text


def number(value: float) -> str:
    """Returns an integer in full, '12,345', and anything else with four digits, '0.9510'."""
    return f'{value:,}' if isinstance(value, int) else f'{value:#.4g}'.rstrip('.')


def line(
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    *,
    examples_per_second: float | None = None,
    input_wait: float | None = None,
    eta_seconds: float | None = None,
) -> str:
    """Formats one line of progress; what is None is left out.

    Args:
        step: steps taken.
        total_steps: steps of the whole job.
        values: name -> value, shown in this order.
        examples_per_second: pace over all replicas.
        input_wait: share of the time, 0 to 1, in which the step waited for its batch.
        eta_seconds: seconds until the job's last step.

    Returns:
        Such as 'step 400/2,000 (20 %)  loss 0.1234  12,345 examples/s  input wait 2 %
        ETA 0:01:23', in one line.
    """
    # Rounded down: 100 % is said of a job that is done.
    parts = [f'step {step:,}/{total_steps:,} ({100 * step // max(total_steps, 1)} %)']
    parts += [f'{name} {number(value)}' for name, value in values.items()]
    if examples_per_second is not None:
        parts.append(f'{examples_per_second:,.0f} examples/s')
    if input_wait is not None:
        parts.append(f'input wait {input_wait:.0%}'.replace('%', ' %'))
    if eta_seconds is not None:
        parts.append(f'ETA {duration(eta_seconds)}')
    return '  '.join(parts)


class Progress:
    """Estimates when a job will be done from its pace over the last few lines.

    All wall time counts, evaluation and saving included, for the rest of the job will have its
    share of them. The start, with its tracing and compiling, counts only until there is more
    to go by.

    Args:
        total_steps: steps of the whole job.
        start_step: the step this process goes on from.
        marks: over how many lines.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        *,
        marks: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps, self._clock = total_steps, clock
        self._marks = collections.deque([(clock(), start_step)], maxlen=marks)
        self._from_start = True

    def update(self, step: int) -> None:
        """Takes note that `step` steps of the job are done now."""
        self._marks.append((self._clock(), step))
        if self._from_start and len(self._marks) > 2:
            self._marks.popleft()
            self._from_start = False

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the job's last step, or None while the pace is unknown."""
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return max(0, self._total_steps - last) * (now - then) / (last - first)

    def line(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        examples_per_second: float | None = None,
        input_wait: float | None = None,
    ) -> str:
        """Takes note of `step` and returns its line; the arguments are those of `line`."""
        self.update(step)
        return line(
            step,
            self._total_steps,
            values,
            examples_per_second=examples_per_second,
            input_wait=input_wait,
            eta_seconds=self.eta_seconds,
        )
