"""One process of `phalanx prepare`: says what is planned, then writes the shards it is told to.

It is spoken to in lines of JSON on stdin, {'split', 'file', 'first', 'end'} of a shard, and ends
when that is closed. What it says on stdout, in lines of JSON too, is one of {'plan': the plan},
{'read': number of records}, {'shard': name, 'record': what is known of it}, and, before it ends in
another way, {'error': message, 'code': exit code}.
"""

import json
import os
import signal
import sys
from pathlib import Path

from trainer import gin_files
from trainer.errors import ConfigError, WriteError


def main() -> int:
    """Runs the process: its arguments are directory, saved configuration and options in JSON."""
    # Ctrl-C is the business of who has started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library or a module of the user's prints must not come between.
    messages = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)

    def say(**message: object) -> None:
        messages.write(json.dumps(message) + '\n')
        messages.flush()

    directory, script, options = sys.argv[1:]
    try:
        from trainer import gin_setup, prepare
        from trainer.data.compressed import decompressing
        from trainer.unfinished import PROGRESS

        how = prepare.Options(**json.loads(options))
        with decompressing(Path(directory) / PROGRESS / 'plain'):
            sources = gin_setup.sources(gin_files.load(script))
        say(plan=prepare.plan(sources, how))
        writers = {}
        for line in sys.stdin:
            shard = json.loads(line)
            split = shard['split']
            if split not in writers:
                writers[split] = prepare.ShardWriter(sources[split], split, how)
            path = Path(directory) / shard['file']
            record = writers[split].write(
                path, shard['first'], shard['end'], lambda count: say(read=count)
            )
            say(shard=shard['file'], record=record)
    except (ConfigError, WriteError) as error:
        say(error=getattr(error, 'message', str(error)), code=error.exit_code)
        return error.exit_code
    except OSError as error:
        say(error=str(error), code=1)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
