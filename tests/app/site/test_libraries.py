"""What a ClientApp imports before it takes its device's turn, in a process of its own."""

import ast
import inspect
import json
import subprocess
import sys

import pytest

from app import client_app
from app.site import libraries
from tests.samples import REPOSITORY

CODE = """
import json, sys
from app.site import libraries
libraries.load()
import app.client_app, app.site.training, app.site.examples, app.site.base_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
def there(*names): return [n for n in names if n in sys.modules]
unused = there(*libraries._UNUSED)
import pyarrow.parquet
print(json.dumps([unused, there("pyarrow"), there("bitsandbytes", "peft", "torch")]))
"""


def test_rows_in_json_lines_need_neither_datasets_nor_pandas_nor_pyarrow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    unused, parquet, needed = json.loads(done.stdout.splitlines()[-1])
    assert unused == []
    assert parquet == ["pyarrow"]  # where a file of rows needs it
    assert needed == ["bitsandbytes", "peft", "torch"]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_turn_is_taken_with_everything_imported(name: str) -> None:
    module = ast.parse(inspect.getsource(client_app))
    functions = (f for f in module.body if isinstance(f, ast.FunctionDef))
    handler = next(f for f in functions if f.name == name)
    lines: dict[str, int] = {}
    for node in ast.walk(handler):
        if isinstance(node, ast.ImportFrom):
            lines["last import"] = max(lines.get("last import", 0), node.lineno)
        if isinstance(node, ast.Call):
            lines.setdefault(ast.unparse(node.func), node.lineno)
    assert lines["libraries.load"] < lines["last import"] < lines["_take_turn"]
    assert "transformers.trainer" in libraries._NEEDED
