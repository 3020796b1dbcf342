"""Every family trained on one topology; the program of one worker of such a job.

usage: python tests/trainer/family_runs.py OUT_DIR DEVICES_PER_WORKER KIND ...   (with TF_CONFIG)

KIND is 'plain', 'techniques' (several at once, of four families), 'crossed' (every technique with
every family) or 'elastic'.
"""

import functools
import json
import pickle
import sys
from pathlib import Path

STEPS, EARLY, BATCH = 20, 8, 16
# Technique -> family -> why they do not go together.
_STATISTICS = 'its batch normalisation needs the whole batch at once'
_PLAYERS = 'its two players are groups already'
WHY_NOT = {
    'accumulation': {
        'cnn': _STATISTICS,
        'resnet': _STATISTICS,
        'simclr': 'its negatives are the whole batch',
    },
    **{name: {'gan': _PLAYERS} for name in ('decay', 'rates', 'freezing')},
    'mixup': {
        'transformer_lm': 'tokens cannot be blended',
        'text_classifier': 'tokens cannot be blended',
        'wide_and_deep': 'categories cannot be blended',
        **dict.fromkeys(('simclr', 'gan'), 'it has no labels'),
    },
}


def techniques():
    """Name -> function from a family to the same with the technique, and its arguments."""
    import keras

    from tests.trainer.families import mixed_up
    from trainer.groups import Group, no_decay
    from trainer.schedule import Schedule

    sgd = functools.partial(keras.optimizers.SGD, momentum=0.9)
    constant = functools.partial(sgd, 0.02)
    adam = {'weight_decay': 0.1, 'epsilon': 1e-3}

    def arguments(optimizer=constant, **more):
        return lambda family: (family, {'optimizer': optimizer, **more})

    return {
        'schedule': arguments(lambda: sgd(Schedule('cosine', 0.02, warmup='20%'))),
        'decay': arguments(lambda: keras.optimizers.AdamW(0.01, **adam), groups=[no_decay()]),
        'lamb': arguments(lambda: keras.optimizers.Lamb(0.01, **adam)),
        'clipping': arguments(functools.partial(sgd, 0.02, global_clipnorm=0.5)),
        'averages': arguments(functools.partial(sgd, 0.02, use_ema=True, ema_momentum=0.9)),
        'rates': arguments(groups=[Group('*kernel', rate=0.5, may_be_empty=True)]),
        'freezing': arguments(groups=[Group('*bias', frozen=True, may_be_empty=True)]),
        'accumulation': arguments(accumulate=2),
        'checkpointing': arguments(remat=['*']),
        'mixup': lambda family: (mixed_up(family), arguments()(family)[1]),
    }


def runs(kind):
    """Name -> (family, arguments of `train`)."""
    import keras

    from tests.trainer.families import elastic_families, families, family_of_all_techniques
    from trainer.groups import no_decay
    from trainer.schedule import Schedule

    if kind == 'crossed':
        return {
            f'{name} {technique}': make(family)
            for name, family in families().items()
            for technique, make in techniques().items()
            if name not in WHY_NOT.get(technique, {})
        }

    sgd = {'optimizer': functools.partial(keras.optimizers.SGD, 0.02, momentum=0.9)}
    if kind == 'plain':
        return {name: (family, sgd) for name, family in families().items()}
    if kind == 'elastic':
        more = {**sgd, 'canonical_shards': 4}
        return {name: (family, more) for name, family in elastic_families().items()}

    def optimizer():
        return keras.optimizers.AdamW(
            Schedule('cosine', 1e-2, warmup='20%'),
            weight_decay=0.1,
            global_clipnorm=0.5,
            epsilon=1e-3,
            use_ema=True,
            ema_momentum=0.9,
        )

    every = {'optimizer': optimizer, 'groups': [no_decay()], 'accumulate': 2}
    chosen = ('resnet', 'vit', 'transformer_lm', 'wide_and_deep')
    return {name: (family_of_all_techniques(name), every) for name in chosen}


def main(out_dir, devices_per_worker, kinds):
    from trainer.checkpoint import Keep
    from trainer.cluster import from_environ
    from trainer.meeting import meet
    from trainer.proof import load
    from trainer.strategy import build_strategy
    from trainer.train import train

    cluster = from_environ()
    meet(cluster, digest='families', deadline_seconds=120)
    strategy = build_strategy(cluster=cluster, devices_per_worker=devices_per_worker)
    found = {}
    for kind in kinds:
        for name, (family, more) in runs(kind).items():
            result = train(
                strategy=strategy,
                cluster=cluster,
                model_dir=str(Path(out_dir, kind, name)),
                model=family.model,
                loss=family.loss,
                train_data=family.data,
                steps=STEPS,
                batch_size=BATCH,
                seed=3,
                log_every=1,
                save_every=4,
                keep=Keep(last=STEPS),
                **{**more, **family.more},
            )
            tensors, _ = load(result.checkpoint)
            early, _ = load(result.checkpoint.with_name(f'step-{EARLY:08}'))
            found[kind, name] = {
                'sha256': result.state_sha256,
                'loss': result.metrics.get('train/loss'),
                'variables': tensors,
                'early': early,
            }
    Path(out_dir, f'{cluster.index}.pickle').write_bytes(pickle.dumps(found))
    hashes = {' '.join(key): run['sha256'] for key, run in found.items()}
    Path(out_dir, f'{cluster.index}.json').write_text(json.dumps(hashes))


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
