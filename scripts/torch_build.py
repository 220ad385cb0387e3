"""Say which build of torch is installed, and what to do where it is larger than the machine needs."""

import torch

versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
build = next((f"{name} {version}" for name, version in versions.items() if version), "CPU")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(f"torch {torch.__version__}: {build} build; GPU: {gpu}")
if build != "CPU" and gpu == "none":
    print("The CPU build is smaller and does the same here: `make clean`, then name its index with TORCH_INDEX=URL")
