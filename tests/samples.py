"""What many tests need: invented question/answer rows, data files of them, and a run config."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config import RunConfig, flatten
from app.server.site_list import site_name

REPOSITORY = Path(__file__).parents[1]

# A program that waits for its signal. In one long sleep it would miss a signal that comes between
# Python's last look and the sleep: Python notes it, and looks again after the sleep.
IDLE = "import time\nwhile True: time.sleep(0.1)"

_QUESTIONS_AND_ANSWERS = (
    ("Which vessel carries blood from the heart to the lungs?", "The pulmonary artery."),
    ("Which vitamin is made in the skin by sunlight?", "Vitamin D."),
    ("Which cells make insulin?", "The beta cells of the pancreas."),
    ("What does haemoglobin carry?", "Oxygen, bound to the iron of its haem groups."),
    ("Which nerve moves the diaphragm?", "The phrenic nerve, from the roots C3 to C5."),
    ("What does a low sodium in the blood do to the brain?", "It makes the brain swell."),
    ("Which organ makes bile?", "The liver; the gallbladder only stores it."),
    ("What is a normal resting heart rate?", "Between 60 and 100 beats a minute."),
    ("Which valve lies between the left atrium and ventricle?", "The mitral valve."),
    ("What does the thyroid need to make its hormones?", "Iodine."),
    ("Which bone is the longest of the body?", "The femur."),
    ("What is an early sign of iron deficiency?", "A low ferritin."),
    ("Which drug reverses an overdose of opioids?", "Naloxone."),
    ("What causes scurvy?", "A lack of vitamin C, which collagen needs."),
    ("Which part of the kidney filters the blood?", "The glomerulus."),
    ("What does warfarin inhibit?", "The recycling of vitamin K in the liver."),
    ("Which hormone raises the calcium in the blood?", "Parathyroid hormone."),
    ("What is the first-line treatment of anaphylaxis?", "Adrenaline into the thigh muscle."),
    ("Which lobe of the brain holds the visual cortex?", "The occipital lobe."),
    ("What does a D-dimer help to rule out?", "A thrombosis or an embolism."),
    ("Which blood group can give red cells to everyone?", "O negative."),
    ("What does the spleen remove?", "Old red cells and coated bacteria."),
    ("Which joint does gout like best?", "The base of the big toe."),
    ("What makes the second heart sound?", "The closing of the aortic and pulmonary valves."),
    ("Which virus causes shingles?", "The varicella zoster virus, when it wakes up again."),
    ("What does surfactant do in the lungs?", "It lowers the surface tension of the alveoli."),
    ("Which electrolyte must be checked before digoxin?", "Potassium."),
    ("What is the usual cause of croup?", "A parainfluenza virus."),
    ("Which gland sits on top of the kidney?", "The adrenal gland."),
    ("What does a troponin tell?", "That heart muscle has been injured."),
)

# As in the flashcards: the question stands in `input`.
ROWS: tuple[dict[str, str], ...] = tuple(
    {"instruction": "Answer this question truthfully", "input": question, "output": answer}
    for question, answer in _QUESTIONS_AND_ANSWERS
)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value a line, UTF-8 as it is; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return path


def write_site_list(folder: Path, listed: Mapping[int, int]) -> Path:
    """The operator's list in this folder, as superlink.register writes it; makes the folder.

    ``listed``: node id -> partition id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {str(node_id): site_name(p) for node_id, p in listed.items()}
    (folder / "sites.json").write_text(json.dumps(named))
    return folder


def flat_config(**changes: object) -> dict[str, object]:
    """pyproject.toml's run config as Flower's flat dict.

    ``changes`` go by field name (``lora_r=4``), so that tests stay short and typed.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    flat = flatten(project["tool"]["flwr"]["app"]["config"])
    key_of = {name: f.metadata["key"] for name, f in RunConfig.__dataclass_fields__.items()}
    return flat | {key_of[name]: value for name, value in changes.items()}


def run_config(**changes: object) -> RunConfig:
    """A checked config, pyproject.toml's but for ``changes`` (by field name)."""
    return RunConfig.from_flat(flat_config(**changes))
