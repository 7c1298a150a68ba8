"""Lines about work that takes long, now and then."""

import time
from collections.abc import Callable

SAY_SECONDS = 30


def now_and_then(say: Callable[[str], object], line: Callable[[int, float], str]) -> Callable[[int], None]:
    """A function that is given how much was done and says ``line`` (done in all, seconds so far) twice a minute."""
    began = said = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal said, done
        done += more
        now = time.monotonic()
        if now - said > SAY_SECONDS:
            said = now
            say(line(done, now - began))

    return advance
