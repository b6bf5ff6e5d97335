"""The two native modules: which are there, which call they can take, and what to do when one is missing."""

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""Logit dtypes the kernels take, and the code each has in ``kernels/include/dtype.h``."""
MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_GROUPS = 32
IMPLEMENTATIONS = ("auto", "native", "torch")

_HOW = {
    "cpu": "the CPU kernels are not built; with a C++ compiler, run `pip install -e .` in the repository",
    "cuda": "the CUDA kernels are not built; put nvcc on PATH and run `MOE_CUDA=ON pip install -e .` in the repository",
}
_warned: set[str] = set()


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"moe_lightning.{name}")
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # it is there and does not load: say why
        device = name.removeprefix("_")
        _HOW[device] = f"the {device} kernels do not load, {error}; run `pip install -e .` in the repository again"
        return None


# At import, not at first use: importing takes milliseconds, and torch.compile cannot trace an import.
_modules: dict[str, ModuleType | None] = {"cpu": _load("_cpu"), "cuda": _load("_cuda")}


def missing(device_type: str) -> str | None:
    """Why there is no native kernel for this device type and what to do about it; None when there is one."""
    if _modules.get(device_type) is not None:
        return None
    return _HOW.get(device_type, f"there are kernels for cpu and cuda only, got device={device_type}")


def module(device_type: str) -> ModuleType:
    """Return the native module for a device type, or raise RuntimeError with what to do."""
    native_module = _modules.get(device_type)
    if native_module is None:
        raise RuntimeError(f"ops.native: {missing(device_type)}")
    return native_module


def kind(tensor: Tensor) -> str:
    """``tensor.device.type``, in a tenth of the time where there are kernels."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type


def place(tensor: Tensor) -> tuple[int, int]:
    """Device index and raw stream of a launch on this tensor's device; (-1, 0) on CPU."""
    if not tensor.is_cuda:
        return -1, 0
    device = tensor.get_device()
    # The raw handle, as torch's own compiled code asks for it: a Stream object would cost a microsecond.
    return device, torch._C._cuda_getCurrentRawStream(device)


# The allocations that torch's own compiled code makes: less host time than torch.empty, which parses.
_guards = torch._C._dynamo.guards
_empty_cpu, _empty_cuda = (getattr(_guards, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda"))
Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def allocator(like: Tensor) -> Allocate:
    """A function of sizes, strides and dtype that makes uninitialised tensors on the device of `like`."""
    if like.is_cuda:
        if _empty_cuda is not None and like.get_device() == torch._C._cuda_getDevice():
            return _empty_cuda
    elif _empty_cpu is not None and like.is_cpu:
        return _empty_cpu
    return lambda sizes, strides, dtype: like.new_empty_strided(sizes, strides, dtype=dtype)


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor that may be left out."""
    return 0 if tensor is None else tensor.data_ptr()


def use_native(component: str, implementation: str, device_type: str, limit: str | None = None) -> bool:
    """Choose native kernels (True) or the torch reference (False).

    ``limit`` is the rule that this call breaks, if it is one that no kernel takes. ``auto`` then warns once
    and uses the reference; ``native`` raises ValueError.
    """
    if implementation == "torch":
        return False
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{component}: implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    reason = limit or missing(device_type)
    if reason is None:
        return True
    if implementation == "native":
        raise ValueError(f"{component}: implementation='native' is not possible: {reason}; or use 'auto'")
    warn_once(f"moe_lightning: using the slower torch reference: {reason}")
    return False


def warn_once(text: str) -> None:
    """Warn the first time a text is seen in this process; silent under torch.compile."""
    if not torch.compiler.is_compiling() and text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
