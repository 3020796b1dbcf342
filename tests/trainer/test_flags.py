import pytest

from trainer import flags
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ('argv', 'rewritten'),
    [
        (['--gin.X=1'], ['--gin_bindings=X=1']),
        (['--gin.X', '1'], ['--gin_bindings=X=1']),
        (['-gin.X=1'], ['--gin_bindings=X=1']),
        (['--gin.X', '-1'], ['--gin_bindings=X=-1']),
        (['--gin.X="a=b"'], ['--gin_bindings=X="a=b"']),
        (['--gin.train/Data.augment=@f'], ['--gin_bindings=train/Data.augment=@f']),
        (['--gin.X=1', '--gin_file=f', '--gin.Y=2'],
         ['--gin_bindings=X=1', '--gin_file=f', '--gin_bindings=Y=2']),
        (['--gin_bindings=X=1', '--model_dir', 'd'], ['--gin_bindings=X=1', '--model_dir', 'd']),
        (['--', '--gin.X=1'], ['--', '--gin.X=1']),
        ([], []),
    ],
)  # fmt: skip
def test_gin_flags_become_bindings(argv, rewritten):
    assert flags.rewrite_gin_flags(argv) == rewritten


def test_order_is_kept_and_model_dir_comes_last():
    options = flags.parse(
        ['--model_dir=d', '--gin_file=a', '--gin.X=1', '--gin_bindings=Y = 2', '--gin_file=b',
         '--gin.X', '3', '--mode=export', '--gin_search_path=p', '--dry_run', '--verbosity=1']
    )  # fmt: skip
    assert options == flags.Options(
        gin_files=('a', 'b'),
        gin_bindings=('X=1', 'Y = 2', 'X=3', "MODEL_DIR = 'd'"),
        gin_search_path=('p',),
        gin_script=None,
        mode='export',
        listen='127.0.0.1:0',
        dry_run=True,
        check_workers=None,
        verbosity=1,
    )


def test_without_flags_there_is_a_default_for_all():
    assert flags.parse([]) == flags.Options(
        (), (), (), None, 'train_and_evaluate', '127.0.0.1:0', False, None, 0
    )


def test_help_lists_every_flag_and_parses_nothing(capsys):
    assert flags.parse(['--no_such_flag', '--help']) is None
    printed = capsys.readouterr().out
    names = ('gin_file', 'gin_bindings', 'gin_search_path', 'model_dir', 'mode', 'dry_run')
    assert all(f'--{name}: ' in printed for name in names)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['--modle_dir=x'],
            "Unknown flag --modle_dir. Did you mean 'model_dir'? Settings of the configuration are "
            'given as --gin.NAME=VALUE; --help lists the flags.',
        ),
        (
            ['--mode=trian'],
            '--mode=trian is none of train, evaluate, train_and_evaluate, export, serve_data. Did '
            "you mean 'train'?",
        ),
        (
            ['runs/digits.gin'],
            "'runs/digits.gin' is not a flag. A file is given as --gin_file=runs/digits.gin.",
        ),
        (['--gin.STEPS'], '--gin.STEPS has no value. Write --gin.STEPS=VALUE.'),
        (['--gin.STEPS', '--dry_run'], '--gin.STEPS has no value. Write --gin.STEPS=VALUE.'),
        (['--model_dir'], 'Missing value for flag --model_dir. --help lists the flags.'),
    ],
)
def test_a_wrong_command_line_gets_one_clear_message(argv, message):
    with pytest.raises(ConfigError) as raised:
        flags.parse(argv)
    assert raised.value.message == message
