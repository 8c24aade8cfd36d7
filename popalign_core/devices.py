"""What a computation runs on, by name."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name; of a processor with what moves its rounding.

    That is the instruction set, which chooses kernels, and the number of threads, which divides sums.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} on {platform.machine()}"
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
