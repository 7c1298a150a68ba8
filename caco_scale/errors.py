"""The one error a user sees: a single line with the numbers in it and the fix, exit code 2, no traceback."""

import atexit
import contextlib
import difflib
import functools
import os
import re
import shlex
import signal
import sys
import time

from caco_scale.console import lasting_console

# Seconds that ranks above 0 wait before they repeat an error: rank 0 usually has the same, and says it.
RANK_PATIENCE_SECONDS = 20
# Who speaks in the errors of a collective: gloo names its source files, NCCL and torch's parts themselves.
PEERS_BACKENDS = r"gloo/|NCCL|TCPStore|c10d"


class UserError(ValueError):
    """A user's mistake. The message is one line: what is wrong, the numbers in it, and what to do."""


class Hung(UserError):
    """A disk does not answer, nor would it to what else a process does at its end: a command ends at once."""


def did_you_mean(name, names):
    """`` (did you mean X?)`` for the name that looks most like ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def one_of(name, names, what):
    """``name`` if it is one of ``names``; else a :class:`UserError` that lists them. ``what``: "bank rule"."""
    if name not in names:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, names)}: give one of {', '.join(names)}")
    return name


def with_article(name: str) -> str:
    """A name as a message has it behind "is" or "returns": ``a str``, ``an int``, ``an efficientnet_b0``."""
    return f"{'an' if name[:1].lower() in tuple('aeio') else 'a'} {name}"


def one_line(error):
    """The message of an exception with every run of white space folded into one blank; without torch's C++ frames."""
    return " ".join(str(error).split("Exception raised from ")[0].split())


def quoted(word):
    """A word of a command that we print, as a shell takes it back: quoted where it must be, and always on one line.

    White space that :func:`one_line` would fold, and what no terminal shows, is written as ``$'...'`` of bash and zsh.
    """
    word = os.fspath(word)
    if word.isprintable() and one_line(word) == word:
        return shlex.quote(word)
    escapes = {"\\": "\\\\", "'": "\\'", " ": "\\x20"}
    plain = lambda c: escapes.get(c, c) if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c))
    return "$'" + "".join(map(plain, word)) + "'"


NO_MEMORY = re.compile(r"can't allocate memory|out of memory|Storage size calculation overflowed")


@contextlib.contextmanager
def _memory_in_words():
    """Memory that nobody has is a mistake in some number; torch has no exception of its own for it on a CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        reason = one_line(error)[:300] or "Python could not allocate any more"
        raise UserError(
            f"out of memory ({reason}): lower what is large (the model, the bank, images at once, views or workers); "
            "caco doctor says what a run needs"
        ) from error


def exit_on_user_error(main):
    """Decorate a command's ``main``: a :class:`UserError` becomes ``error: <line>`` on stderr and exit code 2.

    Of several ranks that make the same mistake only the first speaks: the launcher ends the others meanwhile. A process
    that loses its peers says that in one line, exit code 1; Ctrl-C is 130. The console never ends it
    (:func:`~caco_scale.console.lasting_console`).
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        with lasting_console():
            try:
                with _memory_in_words():
                    return main(*args, **kwargs)
            except UserError as error:
                if _rank():
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    time.sleep(RANK_PATIENCE_SECONDS)
                _end(one_line(error), 2, at_once=isinstance(error, Hung))
            except RuntimeError as error:
                if not is_loss_of_peers(error):
                    raise
                _end(f"another process of this launch has ended or does not answer ({one_line(error)})", 1)
            except KeyboardInterrupt:
                _end("interrupted", 130)

    return run


def is_loss_of_peers(error: BaseException) -> bool:
    """Whether gloo, NCCL or torch's store say that another process is gone or silent."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and re.search(PEERS_BACKENDS, str(error)) is not None


def _rank():
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _end(text, code, at_once=False):
    speaker = f"rank {_rank()}: " if _rank() else ""
    print(f"error: {speaker}{text}", file=sys.stderr, flush=True)
    if at_once:
        os._exit(code)
    sys.exit(code)


_endings = []


def at_end(function):
    """Have ``function`` called when this process ends by itself: as ``atexit`` does, and by :func:`run_command`."""
    atexit.register(function)
    _endings.append(function)


def run_command(main):
    """Run a command's ``main`` as the whole program; a good end ends the process here, with exit code 0.

    The interpreter's own end is left out: a thread of gloo that still holds a tensor of the last exchange asks for the
    interpreter then, and the whole process is aborted (code 134) after all was done and saved. Seen with torch 2.14,
    where it was one of some dozen ends on a busy machine.
    """
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    with lasting_console():
        sys.stdout.flush()
        sys.stderr.flush()
        for function in _endings:
            function()
        os._exit(0)
