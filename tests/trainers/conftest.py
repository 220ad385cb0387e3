"""TRL announces that `rollout_func` is experimental, and asks the network who uses it: both off."""

import os

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1")
