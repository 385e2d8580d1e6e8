"""Writes a model repository for NVIDIA Triton Inference Server, and what runs and balances servers around it.

OUT/models/NAME/config.pbtxt      inputs, outputs, sequence batcher
OUT/models/NAME/1/model.py        imports stepcell
OUT/models/NAME/1/model.onnx      a copy of the model
OUT/haproxy.cfg                   streams to servers, by a header
OUT/serve.sh                      starts a server and watches it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stepcell.contract import StepContract
from stepcell.errors import UsageError
from stepcell.overwrite import MARK
from stepcell.runtime.serving.client_contract import PARAMETER, client_contract
from stepcell.runtime.serving.pbtxt import check_name, check_schema, data_type, listed, quoted
from stepcell.runtime.serving.protocol import CHECK, CLIENT, ID, NUMBER, STEPPED, check_values
from stepcell.runtime.serving.repository_files import write_files
from stepcell.runtime.serving.settings import Settings
from stepcell.runtime.serving.triton_transport import STREAM_HEADER
from stepcell.runtime.serving.wire import Port, Wire

__all__ = ["Address", "Repository"]

CANDIDATES = 65536  # sequences that the batcher lets in; the model refuses what has no slot, at once and by name
HTTP, GRPC = 8000, 8001
_VALUES = 3  # of an input of a check


@dataclass(frozen=True)
class Address:
    """A server: a host, and its ports of HTTP and gRPC."""

    host: str
    http: int = HTTP
    grpc: int = GRPC

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `HOST`, or `HOST:HTTP:GRPC`.

        Raises:
            UsageError: another form.
        """
        match = re.fullmatch(r"([A-Za-z0-9.-]{1,253})(?::(\d{1,5}):(\d{1,5}))?", text)
        if match is None or any(port and not 0 < int(port) < 65536 for port in match.groups()[1:]):
            raise UsageError(
                f"--server: expected HOST or HOST:HTTP:GRPC, got {text!r}", hint="such as 10.0.0.5:8000:8001"
            )
        return cls(match[1], int(match[2] or HTTP), int(match[3] or GRPC))


@dataclass(frozen=True)
class Repository:
    """What is written.

    Attributes:
        source: the model's file.
        contract: of the model.
        folder: OUT.
        name: of the model on the server.
        settings: of the served model.
        instances: processes of one server, each with a loop of its own.
        batch_wait: seconds for which a frame waits for those of other streams.
        servers: for the load balancer.
    """

    source: Path
    contract: StepContract
    folder: Path
    name: str
    settings: Settings
    instances: int = 1
    batch_wait: float = 0.02
    servers: Sequence[Address] = (Address("127.0.0.1"),)

    def write(self, *, overwrite: bool = False) -> list[Path]:
        """Write all files; returns their paths.

        Raises:
            UsageError: a name that Triton does not take, a file there that is not of this command, or frames that
                cannot be sent in the way that the settings say.
            InputError: frames as pixels, and the model does not take one picture.
            OutputError: the folder cannot be written.
        """
        check_name(self.name)
        wire = Wire(self.contract, self.settings.slots, pixels=self.settings.pixels)
        version = self.folder / "models" / self.name / "1"
        texts = {
            version.parent / "config.pbtxt": _config(self, wire),
            version / "model.py": _MODEL,
            self.folder / "haproxy.cfg": _haproxy(self, wire),
            self.folder / "serve.sh": _serve(self),
        }
        check_schema(texts[version.parent / "config.pbtxt"])
        model = version / self.settings.model
        return write_files(self.folder, texts, source=self.source, model=model, data={}, overwrite=overwrite)


_MODEL = f'''"""The model of this repository, {MARK}: streams with states, by stepcell.runtime.serving."""

from stepcell.runtime.serving.triton_model import TritonPythonModel  # noqa: F401
'''


def _config(repository: Repository, wire: Wire) -> str:
    settings = repository.settings
    device = "KIND_CPU" if settings.device == "cpu" else "KIND_GPU"
    gpus = f" gpus: [ {settings.device[5:]} ]" if settings.device.startswith("cuda:") else ""
    inputs = [_tensor(port) for port in wire.inputs] + [_number(NUMBER), _number(CLIENT)]
    outputs = [_tensor(port) for port in wire.outputs] + [_number(STEPPED)]
    if not settings.snapshots.isprintable():
        raise UsageError(f"--snapshots {settings.snapshots!r}: expected printable characters")
    parameters = "\n".join(
        f'parameters {{ key: "{name}" value {{ string_value: {quoted(value)} }} }}'
        for name, value in {
            **settings.parameters(),
            PARAMETER: client_contract(repository.contract, wire).to_sealed_json(),
        }.items()
    )
    return f'''# {MARK}: stepcell triton-repo
name: "{repository.name}"
backend: "python"
max_batch_size: {settings.slots}
input [
{listed(inputs)}
]
output [
{listed(outputs)}
]
instance_group [ {{ count: {repository.instances} kind: {device}{gpus} }} ]
sequence_batching {{
  # The server forgets a stream that was idle for so long, and the model does not: its next frame has START again.
  max_sequence_idle_microseconds: {round(settings.idle * 1e6)}
  oldest {{
    max_candidate_sequences: {CANDIDATES}
    preferred_batch_size: [ {settings.slots} ]
    max_queue_delay_microseconds: {round(repository.batch_wait * 1e6)}
  }}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "{ID}" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
{parameters}
'''


def _tensor(port: Port) -> str:
    """All sizes but the channels are left open: the model's error names what it takes, and a check sends one value."""
    dims = ["-1"] * len(port.shape)
    if port.pixels:
        dims[-1] = str(port.shape[-1])
    return f"{{ name: {quoted(port.spec.name)} data_type: {data_type(port.dtype)} dims: [ {', '.join(dims)} ] }}"


def _number(name: str) -> str:
    return f'{{ name: "{name}" data_type: TYPE_INT64 dims: [ 1 ] }}'


def _check_request(wire: Wire) -> str:
    """The body of a request that steps a frame and belongs to no stream, in JSON."""
    tensors = [
        {
            "name": port.spec.name,
            "shape": values.shape,
            "datatype": port.dtype.upper().replace("FLOAT", "FP"),
            "data": values.ravel().tolist(),
        }
        for port in wire.inputs
        for values in [
            check_values([1] * len(port.shape) + [int(port.shape[-1]) if port.pixels else _VALUES], port.dtype)
        ]
    ]
    numbers = [
        {"name": each, "shape": [1, 1], "datatype": "INT64", "data": [number]}
        for each, number in ((NUMBER, CHECK), (CLIENT, 0))
    ]
    sequence = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
    document = {"parameters": sequence, "inputs": tensors + numbers, "outputs": [{"name": STEPPED}]}
    return msgspec.json.encode(document).decode()


def _haproxy(repository: Repository, wire: Wire) -> str:
    request = f"meth POST uri /v2/models/{repository.name}/infer ver HTTP/1.1 hdr Host check"
    check = f"""    balance hdr({STREAM_HEADER})
    hash-type consistent
    option httpchk
    http-check send {request} hdr Content-Type application/json body '{_check_request(wire)}'
    http-check expect status 200
    default-server check inter 2s fall 2 rise 2"""
    http = [f"    server s{index} {each.host}:{each.http}" for index, each in enumerate(repository.servers)]
    grpc = [
        f"    server s{index} {each.host}:{each.grpc} proto h2 port {each.http} check-proto h1"
        for index, each in enumerate(repository.servers)
    ]
    lines = "\n"
    return f"""# {MARK}: stepcell triton-repo
# Every request has the header {STREAM_HEADER}: frames of a stream go to one server, and to the others when it is down.
# A server is up while it steps a frame. Nothing is retried here; clients do, and frames are numbered.
defaults
    mode http
    retries 0
    timeout connect 2s
    timeout client 1h
    timeout server 60s
    timeout check 10s

frontend http
    bind 127.0.0.1:8080
    default_backend http

frontend grpc
    bind 127.0.0.1:8081 proto h2
    default_backend grpc

backend http
{check}
{lines.join(http)}

backend grpc
{check}
{lines.join(grpc)}
"""


def _serve(repository: Repository) -> str:
    snapshots = repository.settings.snapshots
    mount = f' --volume "{snapshots}:{snapshots}"' if snapshots else ""
    extras = "client,ort" if repository.settings.device == "cpu" else "client,cuda,tensorrt"
    return f"""#!/bin/sh
# {MARK}: stepcell triton-repo
# Starts the server for this repository, steps a frame every two seconds, and starts it again if that fails.
# Options are listed by --help. The server is the one of the environment of $PYTHON:
#   pip install 'stepcell[{extras}]' 'nvidia-pytriton==0.7.0' 'numpy<2'
# or the one of NVIDIA's container (not run by stepcell's tests):
#   docker run --rm --gpus all --shm-size 1g --network host --volume "$PWD:/repository"{mount} \\
#     nvcr.io/nvidia/tritonserver:YY.MM-py3 \\
#     sh -c "pip install 'stepcell[{extras}]' && /repository/serve.sh"
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
exec "${{PYTHON:-python3}}" -m stepcell.runtime.serving.serve "$here/models" --model {repository.name} "$@"
"""
