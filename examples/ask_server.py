"""Start server.py on a free port, send it one POST, print the answer and stop it.

python examples/ask_server.py --model_path demo/model/best_model --context 感冒了
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

SERVER = Path(__file__).resolve().parent.parent / "server.py"


def ask(url: str, body: dict[str, object]) -> list[str]:
    """POST {"context", "maxlength", "samples"} and give the candidates."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode("utf-8"), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for_address(server: subprocess.Popen[str]) -> str:
    """Read the server's lines until it says that it serves, which is when the model is loaded.

    Raises:
        RuntimeError: it ended before that.
    """
    assert server.stdout is not None
    for line in server.stdout:
        print("server:", line.rstrip())
        if found := re.match(r"serving on (http://[\d.]+:\d+)", line):
            return found[1]
    raise RuntimeError(f"the server ended with status {server.wait()}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Start server.py, send it one POST, print the answer and stop it.")
    parser.add_argument("--model_path", default="model/final_model")
    parser.add_argument("--context", default="你好")
    parser.add_argument("--maxlength", type=int, default=50)
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()

    command = [sys.executable, str(SERVER), "--model_path", args.model_path, "--port", "0", "--lang", "en"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        url = wait_for_address(server) + "/generate"
        body = {"context": args.context, "maxlength": args.maxlength, "samples": args.samples}
        print("POST", url, json.dumps(body, ensure_ascii=False))
        print(json.dumps(ask(url, body), ensure_ascii=False, indent=2))
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    print("server stopped with status", server.returncode)
    return server.returncode


if __name__ == "__main__":
    sys.exit(main())
