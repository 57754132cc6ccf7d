"""A command run to its end, of which nothing is left when it takes too long: also not what it has started."""

import contextlib
import subprocess

import psutil


def run_whole(command, timeout=200, **how):
    """As subprocess.run with captured text; at the timeout all of its descendants are killed, in whatever session."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            started = psutil.Process(child.pid)
            for process in [started, *started.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)
