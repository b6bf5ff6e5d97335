"""One check that every op of several tensors needs."""

from torch import Tensor


def check_same_device(component: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming each tensor's device, unless all that are given are on one."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{component}: tensors must be on one device, got {got}; move them with .to(device)")
