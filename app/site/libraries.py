"""What training and evaluation import, in one go: nobody waits for it while a device is held."""

import importlib
import sys

_NEEDED = ("bitsandbytes", "peft", "transformers.trainer", "transformers.models.auto.modeling_auto")
# transformers imports them because they are installed: 1 s, 90 MB and two threads for nothing.
# Rows in a parquet file get pyarrow all the same (app.site.partition).
_UNUSED = ("datasets", "pandas", "pyarrow", "scipy")


def load() -> None:
    """Import them; at once where they are there already, as in a warm ClientApp."""
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # as if not installed
    try:
        for name in _NEEDED:
            importlib.import_module(name)
    finally:
        for name in hidden:
            del sys.modules[name]
