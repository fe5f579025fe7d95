"""The command `kvoffload`; needs the extra `cli`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ("main",)

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 128 + 2
_EXTRAS = {
    **dict.fromkeys(("click", "httpx", "rich", "typer"), "cli"),
    **dict.fromkeys(
        ("fastapi", "httptools", "prometheus_client", "pydantic", "pydantic_settings", "uvicorn"),
        "server",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: The arguments, without the program's name; the process's own by default.
    """
    try:
        from .app import run

        status = run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        print(
            f"kvoffload: error: this needs {missing}, which is not installed; "
            f"install it with: pip install 'kvoffload[{_EXTRAS[missing]}]'",
            file=sys.stderr,
        )
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`); keep the interpreter from complaining
        # once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
