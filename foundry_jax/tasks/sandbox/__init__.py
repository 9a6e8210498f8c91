"""Running programs that a model wrote, without trusting them: is what a completion computes what its test expects?

    require()                                                       # refuses where there can be no sandbox
    [verdict] = run_all([Program(prompt, completion, test, "add")], timeout=3.0)

Two processes a program, each in namespaces of its own, and a pipe between them:

    this process -> supervisor.py -> bwrap -> inside.py, the candidate: runs the prompt and the completion
        (JAX)        (no JAX)     -> bwrap -> inside.py, the judge: runs the test, and asks the candidate for every call

Only plain values cross: numbers, strings, lists and the like. So a program can do nothing for its verdict but answer
calls rightly. It shares no interpreter with the assertions, does not know what they expect, and cannot reach the judge:
exit codes, output, patched builtins, objects that equal everything and walks through frames have nothing to act on.

What holds a program back: no network, no file of this machine but Python's own and those read-only, no environment, a
small /tmp that vanishes, no processes of its own (seccomp.py), limits on memory, CPU, files and time. At the end the
whole namespace is killed, and a verdict is given when nothing of it runs any more.

What remains: the kernel is shared, so a hole in Linux is a hole in the sandbox; a program may use a core for as long as
it has time, and the memory it is allowed. Whether a model knew the answers by heart is no question for a sandbox.
"""

from foundry_jax.tasks.sandbox.host import Program, Verdict, require, run_all

__all__ = ["Program", "Verdict", "require", "run_all"]
