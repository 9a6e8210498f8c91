"""Exit codes, and what is said on the way out."""

import subprocess
import sys

import pytest

from foundry_jax import command, main
from foundry_jax.errors import Preempted, UserError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("x must be 1; try 1."), 1, "error: x must be 1; try 1.\n"),
        (Preempted("step 3 is saved."), 75, "preempted: step 3 is saved.\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was saved since the last checkpoint\n"),
    ],
)
def test_what_ends_a_command_is_one_line_and_an_exit_code(error, code, text, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        command.run(fail)
    assert (stop.value.code, capsys.readouterr().err) == (code, text)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config=a", "--seed=1"], "unrecognized arguments: --se"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_user_error(arguments, message):
    with pytest.raises(UserError, match=f"{message}.*--help"):
        main.parse_arguments(arguments)


def test_the_default_run_folder_tells_runs_apart_and_fits_any_file_system():
    names = [
        main.default_workdir("configs/tiny.py", []),
        main.default_workdir("configs/tiny.py:mla,lr=3e-4", []),
        main.default_workdir("configs/tiny.py:mla,lr=3e-4", ["seed=1"]),
        *[main.default_workdir("configs/tiny.py", [f"data.path={'x' * 300}/{i}"]) for i in range(2)],
    ]
    assert [str(name) for name in names[:2]] == ["runs/tiny", "runs/tiny-mla-lr=3e-4"]
    assert len(set(names)) == len(names)
    assert max(len(name.name) for name in names) < 200


def test_a_reader_who_has_seen_enough_is_no_error():
    program = "from foundry_jax import command; command.run(lambda: [print('x' * 1000) for _ in range(1000)])"
    shell = f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.splitlines()[1] == "141"
