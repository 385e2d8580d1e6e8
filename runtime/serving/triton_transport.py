"""Requests to NVIDIA Triton Inference Server by its own client, tritonclient: HTTP or gRPC."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.optional_imports import require
from stepcell.runtime.serving.client_contract import ServedModel
from stepcell.runtime.serving.protocol import CLIENT, NUMBER, STEPPED, FrameRequest, NotAnswered, RefusedFrame
from stepcell.runtime.serving.shared_memory import FrameMemory, SharedFrames, Tensor

__all__ = ["STREAM_HEADER", "TritonTransport"]

STREAM_HEADER = "x-stream"  # of each request; a load balancer chooses the server by it
_REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
_GONE = "StatusCode.UNAVAILABLE"
# Texts of a server that forgot a sequence before the model did, or that is being stopped: the request is sent again.
_ELSEWHERE = (
    "Unable to find shared memory region",
    "must specify the START flag",
    "unknown model",
    "no available versions",
    "not ready",
)
_CONFIG_SECONDS = 5.0  # at least, for a server's configuration


class TritonTransport:
    """A connection to one server, or to a load balancer before several. Not for two threads.

    Args:
        url, model, timeout, shared_memory: as of `StreamClient`.

    Raises:
        MissingDependencyError: tritonclient is not installed.
        UsageError: a malformed URL.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 10.0, shared_memory: bool = False) -> None:
        scheme, separator, address = url.rpartition("://")
        scheme = scheme if separator else "http"
        if scheme not in ("http", "grpc") or not address.rpartition(":")[2].isdecimal():
            raise UsageError(f"--server {url}: expected http://HOST:PORT or grpc://HOST:PORT")
        self._library: Any = require(f"tritonclient.{scheme}", extra="client", purpose="sending frames to a server")
        self._http, self._address, self._model, self._timeout = scheme == "http", address, model, timeout
        self._connection: Any = None
        self._shared = SharedFrames(self._register, self._unregister) if shared_memory else None

    def infer(self, request: FrameRequest) -> dict[str, NDArray[Any]]:
        """As of `Transport`."""
        numbers = {
            NUMBER: np.array([[request.number]], np.int64),
            CLIENT: np.array([[request.client]], np.int64),
        }
        memory = self._shared.memory_for(request.arrays) if self._shared is not None else None
        sent = numbers if memory is not None else {**request.arrays, **numbers}
        inputs = [self._input(name, array) for name, array in sent.items()]
        options = {}
        if memory is not None:
            inputs += [self._shared_input(memory, name) for name in memory.inputs]
            options["outputs"] = [self._shared_output(memory, name) for name in memory.outputs]
        try:
            answer = self._call(
                "infer",
                self._model,
                inputs,
                sequence_id=request.stream,
                sequence_start=request.start,
                sequence_end=request.end,
                headers={STREAM_HEADER: f"{request.stream:016x}"},
                **options,
            )
        except NotAnswered:
            if self._shared is not None:
                self._shared.abandon()
            raise
        try:
            if memory is not None:
                outputs = memory.read(self._described(answer))
            else:
                outputs = {name: np.array(answer.as_numpy(name)) for name in self._names(answer)}
            stepped = int(outputs[STEPPED][0, 0])
        except (KeyError, IndexError, ValueError, TypeError, InputError) as error:
            raise InputError(
                f"{self._address}: damaged answer to frame {request.number}: {error}",
                hint="a server whose Python has numpy 2, and whose back end was built for numpy 1, sends such",
            ) from error
        if stepped != request.number:
            raise InputError(f"{self._address}: answered frame {stepped} instead of {request.number}")
        if self._shared is not None:
            self._shared.answered(request.arrays, outputs)
        del outputs[STEPPED]
        return outputs

    def snapshot_every(self) -> int | None:
        """As of `Transport`."""
        text = self._parameters().get("snapshot_every", "")
        return int(text) if text else None

    def served(self) -> ServedModel:
        """What the server says of the model.

        Raises:
            ContractError: its configuration was not written by this version, or is damaged.
        """
        return ServedModel.from_parameters(self._parameters(), f"{self._address}: {self._model}")

    def models(self) -> list[str]:
        """Names of the models of the server."""
        options = {} if self._http else {"as_json": True}
        found = self._call("get_model_repository_index", **options)
        return sorted({each["name"] for each in (found if self._http else found.get("models", []))})

    def inputs(self) -> list[tuple[str, list[int], Any]]:
        """Name, shape without the axis of streams (-1: open) and dtype of each input of a frame."""
        from tritonclient.utils import triton_to_np_dtype

        return [
            (each["name"], [int(size) for size in each["dims"]], triton_to_np_dtype(each["data_type"][5:]))
            for each in self._config()["input"]
            if each["name"] not in (NUMBER, CLIENT)
        ]

    def unload(self, seconds: float) -> None:
        """Let the server give up the model, whose instances write their snapshots then; by HTTP only.

        Raises:
            StepcellError: it does not, or not in time.
        """
        self._call("unload_model", self._model)
        ends = time.monotonic() + seconds
        while any(
            each["name"] == self._model and each.get("state") != "UNAVAILABLE"
            for each in self._call("get_model_repository_index")
        ):
            if time.monotonic() > ends:
                raise NotAnswered(f"{self._address}: {self._model} was not unloaded within {seconds:g} s")
            time.sleep(0.1)

    def _parameters(self) -> dict[str, str]:
        found = self._config().get("parameters", {})  # absent by gRPC where there are none
        return {name: value.get("string_value", "") for name, value in found.items()}

    def _config(self) -> Any:
        if self._http:
            return self._call("get_model_config", self._model)
        return self._call("get_model_config", self._model, as_json=True)["config"]

    def close(self) -> None:
        """End the connection."""
        if self._shared is not None:
            self._shared.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):  # of a connection that is broken
                self._connection.close()
        self._connection = None

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        if self._connection is None:
            limits = {"connection_timeout": self._timeout, "network_timeout": self._timeout} if self._http else {}
            self._connection = self._library.InferenceServerClient(self._address, **limits)
        if not self._http:
            options["client_timeout"] = self._timeout if method == "infer" else max(self._timeout, _CONFIG_SECONDS)
        try:
            return getattr(self._connection, method)(*arguments, **options)
        except InferenceServerException as error:
            text, status = str(error.message()), str(error.status())
            refusal = RefusedFrame.parse(text)
            if refusal is not None:
                raise refusal from error
            if self._http or status == _GONE:  # channels of gRPC live on, and wait long until they connect again
                self._disconnect()
            if status in _REFUSED and not any(words in text for words in _ELSEWHERE):
                raise InputError(f"{self._address}: {self._model}: {text}") from error
            raise NotAnswered(f"{self._address}: {text}") from error
        except Exception as error:  # of sockets, gevent and the parser of answers, which share no class
            self._disconnect()
            raise NotAnswered(f"{self._address}: {type(error).__name__}: {error}") from error

    def _register(self, memory: FrameMemory) -> None:
        try:
            self._call("register_system_shared_memory", memory.name, memory.key, memory.size)
        except InputError as error:
            raise InputError(
                error.message,
                hint="shared memory needs a server on this machine; in a container: docker run --ipc host",
            ) from error

    def _unregister(self, memory: FrameMemory) -> None:
        with contextlib.suppress(StepcellError):  # the server is another one
            self._call("unregister_system_shared_memory", memory.name)

    def _shared_input(self, memory: FrameMemory, name: str) -> Any:
        from tritonclient.utils import np_to_triton_dtype

        (shape, dtype), offset = memory.inputs[name]
        found = self._library.InferInput(name, shape, np_to_triton_dtype(dtype))
        found.set_shared_memory(memory.name, memory.inputs[name].tensor.size, offset)
        return found

    def _shared_output(self, memory: FrameMemory, name: str) -> Any:
        found = self._library.InferRequestedOutput(name)
        found.set_shared_memory(memory.name, memory.outputs[name].tensor.size, memory.outputs[name].offset)
        return found

    def _described(self, answer: Any) -> dict[str, Tensor]:
        """Shape and dtype of each output, as the server says."""
        from tritonclient.utils import triton_to_np_dtype

        outputs = answer.get_response()["outputs"] if self._http else answer.get_response().outputs
        if not self._http:
            outputs = [{"name": each.name, "shape": each.shape, "datatype": each.datatype} for each in outputs]
        return {
            each["name"]: Tensor(tuple(each["shape"]), np.dtype(triton_to_np_dtype(each["datatype"])))
            for each in outputs
        }

    def _input(self, name: str, array: NDArray[Any]) -> Any:
        from tritonclient.utils import np_to_triton_dtype

        found = self._library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        found.set_data_from_numpy(array)
        return found

    def _names(self, answer: Any) -> list[str]:
        if self._http:
            return [output["name"] for output in answer.get_response()["outputs"]]
        return [output.name for output in answer.get_response().outputs]
