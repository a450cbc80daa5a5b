"""What the model's process runs: `python child.py ROOT`. It imports nothing but `sys` before the path is safe.

With `python -c` or `python -m` the folder that one stands in would come first on the path, and a `signal.py` that lies
there would run.
"""

import sys

if __name__ == "__main__":
    if sys.path[:1] == [__file__.rpartition("/")[0] or __file__.rpartition("\\")[0]]:
        del sys.path[0]  # this folder, whose modules are not for everyone to import
    sys.path.insert(0, sys.argv[1])

    import signal

    # A server's parent handles Ctrl-C, and a SIGTERM that is sent to all its processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    from gpt2_chinese.decoding.process import run_child

    run_child()
