"""Constraints tried in a process of its own, which ends when one takes too long.

`python -m server.engine.grammar_check SECONDS FOLDER VOCABULARY EOS...` reads a JSON line for each constraint, kind and
source, and answers each with a line: the bytes that it holds once compiled, or the reason why it cannot be used. A line
before all says that it is ready.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from server.engine.allocated import allocated_bytes
from server.engine.constraint import LONGEST_SOURCE, Constraint, ConstraintKind
from server.engine.grammar import STACK_BYTES, Grammar, GrammarCompiler, GrammarError

SMALL_SOURCE = 1024
"""Characters of a constraint that is compiled without having been tried, unless it is `HARD`: the worst that was found
takes a second."""
HARD = re.compile(r"multipleOf|\\u00[4-7]")
"""What no constraint is too small for, and ASCII as JSON escapes, which may spell it. The multiples of a number have
as many states as it is large, which no limit of the library's counts: those of 400,009 take two seconds and 113 MB, and
those of ten million were never done."""
CHECK_SECONDS = 3.0
"""CPU time for one. The library's limits do not bound it: 500 `patternProperties`, 7 KB, take a minute, and an error
below a chain of 2,000 rules half of one."""
MOST_MEMORY = 1 << 32
MOST_BYTES = 1 << 26
"""That a grammar may hold once compiled. Requests that wait keep theirs, which no limit of the bank's counts: a tenant
that sends other large multiples all the time filled 100 MB a request. 5,000 properties hold 42 MB."""


class CheckedCompiler:
    """Compiles constraints, all but small and simple ones after another process has. Thread-safe.

    There are as many of these processes as threads that need one at a time; they start when they are first needed.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        seconds: float = CHECK_SECONDS,
        copies: int = 1,
    ) -> None:
        eos_token_ids = sorted(eos_token_ids)
        arguments = [str(seconds), str(folder), str(vocab_size), *map(str, eos_token_ids)]
        self._seconds = seconds
        self._compiler = GrammarCompiler(folder, vocab_size, eos_token_ids, copies)
        self._command = [sys.executable, "-P", "-m", "server.engine.grammar_check", *arguments]
        self._lock = threading.Lock()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def compile(self, constraint: Constraint) -> Grammar:
        """Raises GrammarError if the constraint cannot be used, or takes too long to find out."""
        size, held = len(constraint.source), 0
        if size <= LONGEST_SOURCE and (size > SMALL_SOURCE or HARD.search(constraint.source)):
            held = self._check(constraint)
        if held > MOST_BYTES:
            limit = f"expected at most {MOST_BYTES >> 20}"
            raise GrammarError(f"it is too complex: it holds {held >> 20} MB once compiled, {limit}")
        grammar = self._compiler.compile(constraint)
        return replace(grammar, num_bytes=max(grammar.num_bytes, held * len(grammar.matchers)))

    def _check(self, constraint: Constraint) -> int:
        """The bytes that it holds, once; 0 where the system does not tell. Raises GrammarError."""
        process = self._take()
        line = json.dumps([constraint.kind, constraint.source]).encode() + b"\n"
        answer = _ask(process, line)
        if not answer:
            self._forget(process)
            raise GrammarError(f"it is too complex: {self._seconds:g} seconds were not enough to compile it")
        with self._lock:
            self._idle.append(process)
        found: int | str = json.loads(answer)
        if isinstance(found, str):
            raise GrammarError(found)
        return found

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
            processes, self._all, self._idle = self._all, set(), []
        for process in processes:
            process.kill()
            _end(process)

    def _take(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._closed:
                raise GrammarError("the engine is being closed")
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._all.add(process)
        if not _ask(process, b""):
            self._forget(process)
            raise GrammarError("this server cannot check constraints")
        return process

    def _forget(self, process: "subprocess.Popen[bytes]") -> None:
        with self._lock:
            self._all.discard(process)
        process.kill()
        _end(process)


def _ask(process: "subprocess.Popen[bytes]", line: bytes) -> bytes:
    """What it answers; nothing if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()
    except (OSError, ValueError):  # ValueError: closed by another thread
        return b""


def _end(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    process.wait()


def serve(compiler: GrammarCompiler, seconds: float) -> None:
    """Answer until there is nothing more to read. What takes too long ends the process, by a signal that nothing holds
    up: the library does not return to the interpreter meanwhile."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write(b"null\n")
    for line in sys.stdin.buffer:
        kind, source = json.loads(line)
        before = allocated_bytes()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            grammar = compiler.compile(Constraint(ConstraintKind(kind), source))
            found: int | str = allocated_bytes() - before
            del grammar
        except GrammarError as refused:
            found = str(refused)
        except BaseException:  # of the library, also a panic: without an answer it would count as too slow
            traceback.print_exc()
            found = "it cannot be compiled"
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(found).encode() + b"\n")


def main() -> int:
    for name in (signal.SIGINT, signal.SIGTERM):  # they may go to the whole group; the engine closes our input
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    seconds, folder, vocab_size, *eos = sys.argv[1:]
    compiler = GrammarCompiler(Path(folder), int(vocab_size), map(int, eos))
    compiler.load()
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=serve, args=(compiler, float(seconds)))
    worker.start()
    worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
