"""Print GPU, versions, and the speed of matrix products and copies as one JSON line."""

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
    """Return name, memory, versions and measured rates (on random numbers)."""
    import torch

    facts = {"python": platform.python_version(), "device": "cpu", "versions": {}}
    for name in PACKAGES:
        try:
            facts["versions"][name] = version(name)
        except PackageNotFoundError:
            facts["versions"][name] = None
    facts["versions"]["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "bf16_tflops": round(2 * 8192**3 / _seconds_of(product) / 1e12, 1),
            "copy_tb_per_second": round(2 * 2**32 / _seconds_of(copy) / 1e12, 2),
        }
    return facts


def product():
    """Return a function that multiplies two 8,192 x 8,192 matrices in bfloat16."""
    import torch

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ b


def copy():
    """Return a function that copies 4 GiB within the GPU, which reads and writes each byte once."""
    import torch

    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _seconds_of(make) -> float:
    """Return the seconds per call over ten calls after three warm-up calls, synchronised before and after."""
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
