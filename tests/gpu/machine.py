"""What the machine is, as one JSON line: GPU, versions, its fastest matrix product and copy."""

import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "triton",
    "liger-kernel",
    "bitsandbytes",
    "flash-attn",
)


def machine() -> dict:
    """Name, memory and versions; the rates are those of random numbers."""
    import torch

    told = {"python": platform.python_version(), "device": "cpu", "versions": {}}
    for name in PACKAGES:
        try:
            told["versions"][name] = version(name)
        except PackageNotFoundError:
            told["versions"][name] = None
    told["versions"]["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "bf16_tflops": round(2 * 8192**3 / _fastest(product) / 1e12, 1),
            "copy_tb_per_second": round(2 * 2**32 / _fastest(copy) / 1e12, 2),
        }
    return told


def product():
    """A function that multiplies two square matrices of 8,192 in bfloat16."""
    import torch

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ b


def copy():
    """A function that copies 4 GiB within the GPU: read once, written once."""
    import torch

    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _fastest(make) -> float:
    """Seconds of one of ten calls after three, the device waited for before and after."""
    import torch

    call = make()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 10


if __name__ == "__main__":
    json.dump(machine(), sys.stdout)
    print()
