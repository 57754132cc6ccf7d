"""A child of this process, forked: what torch costs to import is paid, and what is done to it hurts nobody else."""

import os
import pickle
import traceback


def forked(work, *arguments):
    """Run `work` in a child: what it returns, or by which signal the child was killed, as (result, signal)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            result = work(*arguments)
            with os.fdopen(writing, "wb") as out:
                out.write(pickle.dumps(result))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        content = told.read()
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return (pickle.loads(content) if content else None), (os.WTERMSIG(status) if os.WIFSIGNALED(status) else None)
