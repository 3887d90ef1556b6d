"""The reward servers of the Flow-GRPO repository, which speak pickle over HTTP. Off unless switched on."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowgrpo.data.pictures import check_pixels
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.client import Endpoints
from reward_models._parts import scored_in_parts

__all__ = ["FlowGRPOServer"]


class FlowGRPOServer:
    """The scores of a server that was made for Flow-GRPO's scripts (GenEval, UnifiedReward, DeQA).

    **Why it is off.** Pickle is no data format but a list of instructions: whoever can answer a
    request, the server or anyone on the way to it, since there is neither a token nor encryption, can
    run code in a client that unpickles the answer. And these servers unpickle what *we* send, so
    whoever reaches one can run code on its machine. This client builds only numbers, strings, lists,
    dicts and arrays of numbers from an answer and refuses everything else, but it cannot make the
    server safe. Prefer ``flowgrpo serve-reward`` and ``model = "remote"``. Where that is no option,
    set ``allow_pickle = true``, and only with a server on this machine or in a network of your own.

    ``geneval`` sends prompts' metadata (with ``tag``, ``include`` and ``exclude``) and gives Flow-GRPO's
    soft score, or ``strict_rewards`` with ``key``; ``prompts`` sends the prompts, ``images`` none, and
    both give ``outputs``. Images travel as JPEG of quality 95: these servers expect it.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        protocol: Literal["geneval", "prompts", "images"],
        allow_pickle: bool = False,
        key: str = "",
        only_strict: bool = True,
        timeout: float = 120.0,
        patience: float = 300.0,
        concurrency: int = 2,
        part: int = 64,
    ):
        """
        Args:
            url: One server or several equal ones, such as ``http://127.0.0.1:18085``.
            protocol: What is sent; see above.
            allow_pickle: Must be true, by which you say that you trust the server and the network.
            key: Of the answer, with one number per image; by default ``scores`` for ``geneval`` and
                ``outputs`` otherwise.
            only_strict: Part of ``geneval``'s requests.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a request is tried again.
            concurrency: Requests under way at one server.
            part: Samples in one request.

        Raises:
            ValueError: If ``allow_pickle`` is not set, or another option is out of range.
        """
        if not allow_pickle:
            raise ValueError(
                "flow_grpo_server speaks pickle, by which a server can run code here and anyone who "
                "reaches it can run code there. Serve the reward with 'flowgrpo serve-reward' and use "
                "model = 'remote'; or, for a server and a network that you trust, set the option "
                "allow_pickle = true"
            )
        if protocol not in ("geneval", "prompts", "images") or part < 1:
            raise ValueError(
                "protocol must be 'geneval', 'prompts' or 'images' and part at least 1, got "
                f"{protocol!r}, {part}"
            )
        self.endpoints = Endpoints(
            url, timeout=timeout, patience=patience, concurrency=concurrency
        )  # fmt: skip
        self.protocol, self.only_strict, self.part = protocol, only_strict, part
        self.key = key or ("scores" if protocol == "geneval" else "outputs")

    def __call__(
        self, media: Float[Tensor, "batch 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            RuntimeError: If no part of the batch was scored; says why.
        """

        def ask(part: Tensor, owners: Sequence[Prompt]) -> list[float]:
            body = self._request(part, owners)
            answer = self.endpoints.request("/", "application/octet-stream", body)
            return self._numbers(answer, len(owners))

        return scored_in_parts(self.endpoints, media, prompts, self.part, ask)

    def _request(self, media: Tensor, prompts: Sequence[Prompt]) -> bytes:
        data: dict[str, Any] = {"images": [_jpeg(m) for m in media]}
        if self.protocol == "geneval":
            data["meta_datas"] = [{**p.metadata, "prompt": p.text} for p in prompts]
            data["only_strict"] = self.only_strict
        elif self.protocol == "prompts":
            data["prompts"] = [p.text for p in prompts]
        return pickle.dumps(data)

    def _numbers(self, answer: bytes, number: int) -> list[float]:
        """The scores in an answer. Raises ValueError if there are none."""
        value = load_numbers(answer)
        if not isinstance(value, dict) or self.key not in value:
            keys = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"the answer has no {self.key!r}; it has {keys}")
        found = np.asarray(value[self.key], dtype=np.float64)
        if found.shape != (number,):
            raise ValueError(f"{self.key!r} has shape {found.shape} for {number} samples")
        return [float(v) for v in found]


def _jpeg(image: Tensor) -> bytes:
    check_pixels(image)
    buffer = io.BytesIO()
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def load_numbers(data: bytes) -> Any:
    """What a pickle holds, if that is numbers, strings, lists, dicts and arrays of numbers only.

    Raises:
        ValueError: If it asks for anything else, which is not run.
    """
    try:
        return _plain(_Numbers(io.BytesIO(data)).load())
    except Exception as error:
        raise ValueError(f"the answer is no pickle of plain numbers: {error}") from error


class _Numbers(pickle.Unpickler):
    """Builds nothing but what is listed here, and arrays by our own code in place of NumPy's."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 1 and 2 call their module differently.
        place = (module.replace("numpy.core", "numpy._core"), name)
        if place not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[place]


class _Dtype:
    """In place of a dtype: its code, if that is one of numbers."""

    def __init__(self, code: str, *_: object):
        if np.dtype(code).kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """In place of an array, until its content is known."""

    value: np.ndarray

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C").value


def _array(
    content: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str = "C"
) -> _Array:
    array = _Array()
    flat = np.frombuffer(content, dtype.dtype)
    array.value = flat.reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _Dtype, content: bytes) -> float:
    return float(np.frombuffer(content, dtype.dtype)[0])


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array,
}


def _plain(value: Any) -> Any:
    """With arrays as what they are."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
