"""What Slurm says of a job, read from the text of its programs.

Their text has stayed the same for many versions, their JSON has not.
"""

import dataclasses
import re
import subprocess
from collections.abc import Mapping, Sequence

from launch.backends import Unreachable
from launch.nodelist import expand

_ANSWER_SECONDS = 60.0  # Slurm's own programs give up on a controller after some ten.

# https://slurm.schedmd.com/job_state_codes.html
_STATES = {
    'PENDING': 'pending',
    'CONFIGURING': 'pending',
    'REQUEUED': 'pending',
    'REQUEUE_FED': 'pending',
    'REQUEUE_HOLD': 'pending',
    'RESV_DEL_HOLD': 'pending',
    'SPECIAL_EXIT': 'pending',
    'RUNNING': 'running',
    'COMPLETING': 'running',
    'POWER_UP_NODE': 'running',
    'RESIZING': 'running',
    'SIGNALING': 'running',
    'STAGE_OUT': 'running',
    'STOPPED': 'running',
    'SUSPENDED': 'running',
    'COMPLETED': 'finished',
    'CANCELLED': 'cancelled',
    'BOOT_FAIL': 'failed',
    'DEADLINE': 'failed',
    'FAILED': 'failed',
    'LAUNCH_FAILED': 'failed',
    'NODE_FAIL': 'failed',
    'OUT_OF_MEMORY': 'failed',
    'PREEMPTED': 'failed',
    'RECONFIG_FAIL': 'failed',
    'TIMEOUT': 'failed',
}

# Of https://slurm.schedmd.com/job_reason_codes.html those that do not pass by themselves.
_NEVER = re.compile(
    r"""
    AccountNotAllowed | BadConstraints | DeadLine | DependencyNeverSatisfied | InvalidAccount
    | InvalidQOS | JobHeldAdmin | JobHeldUser | JobHoldMaxRequeue | MaxMemPerLimit | NodeDown
    | PartitionConfig | PartitionDown | PartitionInactive | PartitionNodeLimit | PartitionTimeLimit
    | QOSNotAllowed | QOSTimeLimit | ReservationDeleted | AssociationTimeLimit
    | (Assoc|QOS)Max\w*(PerJob|PerNode|WallDuration)\w* | QOSMin\w*
    # A maintenance ends, but nodes that are down or drained need someone.
    | ReqNodeNotAvail\W+UnavailableNodes:[^(\s].*
    | .*requeued.held
    """,
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What Slurm knows of a job, or of an element of an array.

    Attributes:
        job_id: of this element alone, such as '12_3'; that of the array for all that wait. Elements
            have ids of their own, too, but not all of Slurm's programs know them at all times.
        elements: its number in an array, or those of all that wait; none if it is no array.
        word: the state in Slurm's words.
        state: one of `launch.backends.STATES`.
        reason: why it is so, in Slurm's words.
        never: whether it waits for what will not come by itself.
        restarts: how often it was requeued.
        nodes: a node list, '' while it has none.
        code: the exit code of the batch script, negative for a signal; 0 before its end.
        output: the path of the output file, '' if it is not told.
        requeue: whether it may be requeued.
        preempted: whether it is being preempted.
    """

    job_id: str
    elements: tuple[int, ...]
    word: str
    state: str
    reason: str = ''
    never: bool = False
    restarts: int = 0
    nodes: str = ''
    code: int = 0
    output: str = ''
    requeue: bool = True
    preempted: bool = False


def cluster_name() -> str:
    """Returns the name of the cluster that this host belongs to, 'local' if it has none."""
    config = run(['scontrol', 'show', 'config']).stdout
    match = re.search(r'^ClusterName\s*=\s*(\S+)', config, re.MULTILINE)
    return match[1] if match else 'local'


def run(
    command: Sequence[str], *, text: str = '', environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs one of Slurm's programs.

    Args:
        command: the program and its arguments.
        text: for its input.
        environment: in place of this process's.

    Raises:
        Unreachable: it is not there, or does not answer.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            input=text,
            env=environment,
            encoding='utf-8',
            errors='surrogateescape',
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise Unreachable(
            f"{command[0]} is not on this host. Do this where Slurm's programs are, such as on a "
            'login node.'
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f'{command[0]} has not answered for {_ANSWER_SECONDS:.0f} s.') from None


def jobs(job_id: str, cluster: Sequence[str] = ()) -> list[Record]:
    """Returns what the controller knows of a job, one record an element if it is an array.

    Args:
        job_id: such as '12', or '12_3' for an element.
        cluster: options that lead to another cluster than this host's.

    Returns:
        None of them if the controller knows no such job: it forgets those that have ended.

    Raises:
        Unreachable: the controller cannot be asked.
    """
    done = run(['scontrol', *cluster, 'show', 'job', job_id])
    if done.returncode:
        if re.search('invalid job id|job_id|not found', done.stderr, re.IGNORECASE):
            return []
        raise Unreachable(f'scontrol show job {job_id}: {done.stderr.strip()}')
    return parse_jobs(done.stdout)


def accounts(job_id: str, cluster: Sequence[str] = ()) -> list[Record] | None:
    """Returns what the accounts hold of a job, like `jobs`; None where nobody keeps any."""
    columns = 'JobID,State,ExitCode,NodeList'
    try:
        done = run(['sacct', *cluster, '-j', job_id, '-DXPn', '-o', columns])
    except Unreachable:
        return None
    return None if done.returncode else parse_accounts(done.stdout)


def parse_jobs(text: str) -> list[Record]:
    """Reads what `scontrol show job` prints."""
    found = []
    for block in re.split(r'\n\s*\n', text.strip('\n')):
        # The first line holds the name of the job, which may look like anything.
        first, _, rest = block.partition('\n')
        ids = re.match(r'JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\S+))?', first)
        state = re.search(r'^\s+JobState=(\S+) Reason=(.*?)(?: \S+=.*)?$', rest, re.MULTILINE)
        if not ids or not state:
            continue
        output = re.search(r'^\s+StdOut=(.*)$', rest, re.MULTILINE)
        reason = '' if state[2] == 'None' else state[2].replace('_', ' ')
        nodes = _field(rest, 'NodeList')
        found.append(
            _record(
                f'{ids[2]}_{ids[3]}' if (ids[3] or '').isdigit() else ids[2] or ids[1],
                _elements(ids[3] or ''),
                state[1],
                _field(rest, 'ExitCode'),
                reason=reason,
                never=_STATES.get(state[1]) == 'pending' and bool(_NEVER.fullmatch(reason)),
                restarts=int(_field(rest, 'Restarts') or 0),
                nodes='' if nodes == '(null)' else nodes,
                output=output[1].replace('%%', '%') if output else '',
                requeue=_field(rest, 'Requeue') != '0',
                preempted=_field(rest, 'PreemptTime')[:1].isdigit(),
            )
        )
    return found


def parse_accounts(text: str) -> list[Record]:
    """Reads what `sacct -DXPn -o JobID,State,ExitCode,NodeList` prints."""
    found: dict[str, Record] = {}
    for line in text.splitlines():
        name, word, code, nodes = line.split('|')
        before = found.get(name)
        # A row for each time that it was started, in their order.
        found[name] = _record(
            name,
            _elements(name.partition('_')[2]),
            word.split()[0],  # CANCELLED by 1000
            code,
            nodes='' if nodes == 'None assigned' else nodes,
            restarts=before.restarts + 1 if before else 0,
        )
    return list(found.values())


def _record(job_id: str, elements: tuple[int, ...], word: str, code: str, **more: object) -> Record:
    status, _, signal = code.partition(':')
    number = -int(signal) if signal.isdigit() and int(signal) else int(status or 0)
    state = _STATES.get(word, 'unknown')
    if word == 'FAILED' and number == 75:
        state = 'stopped'
    return Record(job_id, elements, word, state, code=number, **more)


def _field(text: str, name: str) -> str:
    match = re.search(rf'\s{name}=(\S*)', text)
    return match[1] if match else ''


def _elements(text: str) -> tuple[int, ...]:
    """Reads the numbers of elements: '3' of one, '3-5,7%2' or '[3-5,7%2]' of those that wait."""
    ranges = re.fullmatch(r'\[?([0-9,-]+)(?:%\d+)?\]?', text)
    return tuple(map(int, expand(f'[{ranges[1]}]'))) if ranges else ()
