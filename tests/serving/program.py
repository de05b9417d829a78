"""`rsgwm serve` as a program of its own."""

import contextlib
import re
import subprocess
import sys

SECONDS = 60
MAIN = (sys.executable, "-c", "from mlx_rsgwm.cli.main import main; main()")


@contextlib.contextmanager
def serving(*arguments, cwd=None):
    """The program on a free port: the process and its address."""
    command = [*MAIN, "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                yield process, found[1]
                break
        else:
            raise AssertionError(f"it never served: {lines} {process.stderr.read()[-2000:]}")
    finally:
        process.kill()
        process.wait(SECONDS)
