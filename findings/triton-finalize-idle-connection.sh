#!/usr/bin/env bash
# One idle HTTP connection, and Triton ends on SIGTERM without `finalize` of its Python models.
#
# Versions:  Triton Inference Server 2.51.0 (nvidia-pytriton 0.7.0), numpy 1.26.4, Python 3.11, Linux x86-64.
# Input:     a model of Python whose `finalize` writes a file.
# Behaviour: on SIGTERM the server waits for its connections to close, also those that are idle, until the exit time-out
#            (30 s by default; 3 s here), and then exits at once: the models are not unloaded, and the processes of
#            Python models are told nothing. Without a connection `finalize` is called. Every client of HTTP keeps its
#            connection open between requests.
# Seen:      finalize called: with no connection True, with an idle one False.
# Whom:      models that hold a state, a file or a counter and write it in `finalize`: lost at each update of a server
#            that has clients. Unloading the model before the signal cures it (--model-control-mode=explicit).
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

mkdir -p models/m/1
cat > models/m/config.pbtxt <<'PB'
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
PB
cat > models/m/1/model.py <<PY
class TritonPythonModel:
    def execute(self, requests):
        return []

    def finalize(self):
        open("$folder/finalized", "w").close()
PY
cat > probe.py <<'PY'
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request

import pytriton

wheel = pathlib.Path(pytriton.__file__).parent
server, python = wheel / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
stub = server / "backends" / "python" / "triton_python_backend_stub"
stub.unlink(missing_ok=True)
stub.symlink_to(server / "python_backend_stubs" / python / stub.name)
environment = {
    **os.environ,
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{wheel.parent / 'nvidia_pytriton.libs'}",
}
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]


def finalized(connections):
    mark = pathlib.Path("finalized")
    mark.unlink(missing_ok=True)
    process = subprocess.Popen(
        [server / "bin" / "tritonserver", "--model-repository=models", f"--backend-directory={server / 'backends'}",
         "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
         "--exit-timeout-secs=3"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/m/ready", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, "the server does not start"
            time.sleep(0.1)
    else:
        raise SystemExit("the server does not become ready")
    held = []
    for _ in range(connections):
        held.append(socket.create_connection(("127.0.0.1", port)))
        held[-1].sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[-1].recv(100).startswith(b"HTTP/1.1 200")
    process.terminate()
    process.wait(60)
    for each in held:
        each.close()
    time.sleep(1)
    return mark.exists()


without, idle = finalized(0), finalized(1)
print(f"finalize called: with no connection {without}, with an idle one {idle}")
assert without, "changed, or not tested: it is not called at all"
assert not idle, "changed: it is called in spite of the connection"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 numpy==1.26.4
env/bin/python probe.py
echo "as described"
