"""The words before the module by which each launcher starts a run, for tests of whole runs."""

import socket


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launchers(processes):
    """Return the words before the module. accelerate needs --multi_gpu for several processes on CPUs too."""
    accelerate = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    accelerate += ["--num_processes", str(processes), "--dynamo_backend", "no", "--main_process_port", free_port()]
    accelerate.append("--cpu" if processes == 1 else "--multi_gpu")
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return {"accelerate": [*accelerate, "-m"], "torchrun": [*torchrun, "-m"], "python": ["-m"]}
