"""What the fork server imports: Flower's ClientApp process, and what training and evaluation need.

Nothing of the run's app, which arrives with the run. On a host with GPU nothing either that asks
CUDA for anything while it is imported: what is forked could not use the GPU then.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FLOWER = "flwr.supernode.cli.flwr_clientapp"
_COMMON = (
    FLOWER, "torch", "torch._dynamo", "accelerate",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
# bitsandbytes asks for the GPU's capability when it is imported; PEFT and the Trainer import it.
_NOT_WITH_CUDA = ("bitsandbytes", "peft", "transformers.trainer")
# transformers imports them because they are there. Rows in JSON lines need none of them, and
# pyarrow starts a thread.
UNUSED = ("datasets", "pandas", "pyarrow", "scipy")


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """To what is imported meanwhile, these packages are not installed."""
    new = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in new:
            del sys.modules[package]


def load(device: str) -> None:
    """Import them; ``device`` is cuda or cpu."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks for a GPU does not start CUDA
    with hidden(*UNUSED):
        for name in _COMMON + (() if device == "cuda" else _NOT_WITH_CUDA):
            importlib.import_module(name)
