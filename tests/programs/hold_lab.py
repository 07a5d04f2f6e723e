"""Build a lab, start two sleeping ranks on it, print its namespaces, then end as the argument says.

It ends when its input ends, or by a signal.

hold_lab.py normally | by-exception | when-killed
"""

import os
import sys
from threading import Thread

from benchmarks.netlab.lab import Lab

SLEEP = [sys.executable, "-c", "import os, time; os.write(1, b'awake\\n'); time.sleep(60)"]

how = sys.argv[1]
with Lab(hosts=2, rate="1gbit") as lab:
    holders = [f"/proc/{pid}/ns/net" for pid in lab.pids]
    print(*map(os.readlink, holders), flush=True)
    if how == "when-killed":
        lab.mpiexec(SLEEP, capture=False)
    Thread(target=lab.mpiexec, args=[SLEEP], kwargs={"capture": False}).start()
    sys.stdin.read()
    if how == "by-exception":
        raise RuntimeError("to be seen outside")
