"""Stand-ins for the programs that a launch starts, which note exactly what they were given."""

import json
import stat
import sys

_NOTE = """\
#!{python}
import json, os, signal, sys, time
note = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "session": os.getsid(0), "pid": os.getpid(), "env": dict(os.environ)}}
with open({file!r} + ".partial", "w") as out:
    json.dump(note, out)
os.rename({file!r} + ".partial", {file!r})
{then}
"""


def standin(path, then=""):
    """An executable that writes what it was given to path + ".json", then does what `then` says in Python. Its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_NOTE.format(python=sys.executable, file=f"{path}.json", then=then))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def noted(path):
    """What the stand-in was given, or None where it was not run yet."""
    file = path.with_name(path.name + ".json")
    return json.loads(file.read_text()) if file.exists() else None
